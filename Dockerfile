# syntax=docker/dockerfile:1
# Builds two images, `--target cpu` and `--target gpu`; the build context is the root of the repository.
# The only weights inside are those of the bundled decoder, and there are no engines: mount bundles at /bundles.
# docs/operations.md explains how to update the digest, which is that of all platforms.
ARG PYTHON=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d


# Python packages, in a virtual environment that later stages copy as a whole.
FROM ${PYTHON} AS packages
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# Dependencies for serving with JPEG XL and traces, and on GPUs also for captions and for compiling engines. The sources
# are not copied here, so that a changed source file does not invalidate the layers with the packages.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    serving = [*project['dependencies'], *extras['jxl'], *extras['otel']]; \
    print(*serving, sep='\n', file=open('requirements.txt', 'w')); \
    print(*extras['captions'], *extras['engines'], sep='\n', file=open('requirements-engines.txt', 'w'))"


FROM packages AS packages-cpu
# Set it to an empty string to use pip's default index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN pip install --no-compile --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "$(grep '^torch==' constraints.txt)" \
    && pip install --no-compile --constraint constraints.txt --requirement requirements.txt
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils
COPY docker/slim.sh ./
RUN ./slim.sh /opt/venv


FROM packages AS packages-gpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
COPY docker/requirements-gpu.txt ./
# hadolint ignore=DL3013
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "$(grep '^torch==' constraints.txt)" \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements-engines.txt \
    && pip install --requirement requirements-gpu.txt


# Everything except the packages.
FROM ${PYTHON} AS server
LABEL org.opencontainers.image.title="PiD decode server" \
    org.opencontainers.image.description="HTTP server for PiD, a diffusion decoder that turns latents into images" \
    org.opencontainers.image.licenses="Apache-2.0"
# /cache holds compiled code. Mount a volume there, or it is compiled again at every start.
RUN groupadd --gid 10001 pid \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin pid \
    && install --directory --owner=10001 --group=10001 /cache /bundles
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    PID_CACHE_DIR=/cache \
    PID_HOST=0.0.0.0 \
    PID_PORT=8000 \
    PID_BUNDLE=/bundles/current
WORKDIR /app
COPY LICENSE build_engines.py docker/healthcheck.py docker/fetch_bundle.py ./
COPY engines engines
COPY server server
COPY loadtest loadtest
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Tests readiness, not only liveness, so that dependent services wait. The start period allows for compiling kernels.
HEALTHCHECK --interval=5s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "healthcheck.py"]
ENTRYPOINT ["python", "-m", "server"]


# Start the server once: modules that it imports are compiled, and the build fails if the image does not work.
FROM server AS compiled-cpu
COPY --from=packages-cpu /opt/venv /opt/venv
# hadolint ignore=DL3002
USER 0:0
COPY docker/compile.sh ./
RUN ./compile.sh


FROM server AS cpu
COPY --from=compiled-cpu /opt/venv /opt/venv
COPY --from=compiled-cpu /app /app


FROM server AS server-gpu
# hadolint ignore=DL3002
USER 0:0
# Triton, which torch.compile uses, needs a C compiler at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility


FROM server-gpu AS gpu
COPY --from=packages-gpu /opt/venv /opt/venv
