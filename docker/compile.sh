#!/bin/sh
# Build a bundle and start a server with it, once, so that Python writes the byte code of all modules that this imports.
set -eu
export PYTHONDONTWRITEBYTECODE="" PID_BUNDLE=/tmp/demo PID_CACHE_DIR=/tmp/cache PID_DRAIN_DELAY=0
python build_engines.py --decoder dct-demo --target cpu --output "$PID_BUNDLE"
python -m server &
until python healthcheck.py; do
    kill -0 $! # ends this script if the server has ended
    sleep 1
done
kill $!
wait $!
rm -r /tmp/demo /tmp/cache compile.sh
