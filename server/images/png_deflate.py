"""Compiled deflate for filtered photographs: Huffman codes, and matches only for runs of zeros (RFC 1951).

String matching would not pay off in photographs. Indices and shifts are unsigned, because numba checks signed indices
for negative values and converts expressions of mixed signs to floats. The kernels are in one file because of numba's
cache; see `kernel`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from server.images.numba_kernel import kernel

BLOCK_BYTES = 100_000  # per block; fflate, a JavaScript decoder, misreads a block of more than 128 KiB of literals
LITERAL_BITS = 12  # of the longest literal code; two codes and their joint length fit into 32 bits
MAX_MATCH = 258
END_OF_BLOCK = 256
SYMBOLS = 286  # literals, end of block, match lengths

_LENGTH_ORDER = np.array([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15])  # RFC 1951, 3.2.7
_REPEAT_BITS = np.array([2, 3, 7])  # extra bits of the code length symbols 16, 17, 18
_U8, _U32, _U64 = np.uint8, np.uint32, np.uint64


# Huffman codes -------------------------------------------------------------------------------------------------------


@kernel
def _used_symbols(counts: np.ndarray) -> np.ndarray:
    """Return the symbols [n] int64 with a count above 0, rarest first, by insertion sort."""
    order = np.empty(len(counts), np.int64)
    n = 0
    for symbol in range(len(counts)):
        if counts[symbol]:
            at = n
            while at and counts[order[at - 1]] > counts[symbol]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = symbol
            n += 1
    return order[:n]


@kernel
def code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Return optimal code lengths [S] uint8 of at most `limit` bits for `counts` [S] int64; 0 for unused symbols.

    The algorithm is package-merge.
    """
    lengths = np.zeros(len(counts), np.uint8)
    order = _used_symbols(counts)
    n = len(order)
    if n == 1:  # a single symbol needs a bit, too
        lengths[order[0]] = 1
        return lengths
    weights = np.empty(2 * n, np.int64)  # of a level: leaves merged with packages of two items of the previous level
    packages = np.empty(n, np.int64)
    leaves_before = np.zeros((limit, 2 * n + 1), np.int64)  # leaves among the first i items of each level
    items = 0
    for level in range(limit):
        paired = items // 2
        for i in range(paired):
            packages[i] = weights[2 * i] + weights[2 * i + 1]
        items = n + paired
        leaf = 0
        for i in range(items):
            package = i - leaf
            if package >= paired or (leaf < n and counts[order[leaf]] <= packages[package]):
                weights[i] = counts[order[leaf]]
                leaf += 1
            else:
                weights[i] = packages[package]
            leaves_before[level, i + 1] = leaf
    selected = 2 * n - 2
    for level in range(limit - 1, -1, -1):
        leaves = leaves_before[level, selected]
        for leaf in range(leaves):
            lengths[order[leaf]] += 1
        selected = 2 * (selected - leaves)
    return lengths


@kernel
def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Return canonical codes [S] uint32 for `lengths` [S] uint8 (RFC 1951, 3.2.2).

    The low 24 bits are the code, its first bit lowest, and the high 8 bits its length.
    """
    codes = np.zeros(len(lengths), np.uint32)
    code = 0
    for length in range(1, 16):
        for symbol in range(len(lengths)):
            if lengths[symbol] == length:
                reverse = 0
                for bit in range(length):
                    reverse |= (code >> bit & 1) << (length - 1 - bit)
                codes[symbol] = reverse | length << 24
                code += 1
        code <<= 1
    return codes


@kernel
def _pair_codes(codes: np.ndarray, pairs: np.ndarray) -> None:
    """Write the joint codes of two bytes into `pairs` [65536] uint32, indexed by first + 256 * second."""
    for second in range(256):
        code = codes[second] & _U32(0xFFFFFF)
        length = codes[second] & _U32(0xFF000000)
        row = pairs[256 * second : 256 * second + 256]
        for first in range(256):
            row[first] = codes[first] + length + _U32(code << (codes[first] >> _U32(24)))


# Bits ----------------------------------------------------------------------------------------------------------------
# A bit stream is a uint64 array and a state (number of full words, the partial word, number of bits in it); the lowest
# bit comes first.


@kernel
def _put(words: np.ndarray, state: Any, value: int, length: int) -> Any:
    """Append the low `length` bits of `value`, 0 to 63, without a branch that could be mispredicted."""
    full, word, filled = state
    word |= _U64(value) << filled
    words[full] = word
    end = filled + _U64(length)
    if end >= _U64(64):
        word = (_U64(value) >> _U64(1)) >> (_U64(63) - filled)
    return full + (end >> _U64(6)), word, end & _U64(63)


@kernel
def _flush(words: np.ndarray, state: Any) -> Any:
    """Store the partial word, so that `words` contains every bit; more bits can be appended."""
    words[state[0]] = state[1]
    return state


@kernel
def _put_code(words: np.ndarray, state: Any, code: int) -> Any:
    return _put(words, state, code & _U32(0xFFFFFF), code >> _U32(24))


@kernel
def _put_literals(
    words: np.ndarray, state: Any, data: np.ndarray, start: int, stop: int, codes: Any, pairs: Any
) -> Any:
    """Append the codes of data[start:stop], four bytes at a time; `start` is a multiple of four."""
    doubles = data[: len(data) // 2 * 2].view(np.uint16)
    whole = start + (stop - start) // 4 * 4
    for i in range(start // 2, whole // 2, 2):
        one, two = _U64(pairs[doubles[i]]), _U64(pairs[doubles[i + 1]])
        length = one >> _U64(24)
        joint = (one & _U64(0xFFFFFF)) | ((two & _U64(0xFFFFFF)) << length)
        state = _put(words, state, joint, length + (two >> _U64(24)))
    for i in range(whole, stop):
        state = _put_code(words, state, codes[data[i]])
    return state


# Deflate -------------------------------------------------------------------------------------------------------------


@kernel
def find_runs(data: np.ndarray, runs: np.ndarray) -> int:
    """Find runs of zeros to code as matches of distance 1; write them to `runs` as (start, length) and count them.

    Starts and lengths are multiples of four, because literals are coded four at a time. A length is a sum of valid
    match lengths, and a zero precedes each start. Only runs that fill two aligned words count; coding a shorter one
    costs about as much as its literals.
    """
    words = data[: len(data) // 8 * 8].view(np.uint64)
    quads = data[: len(data) // 4 * 4].view(np.uint32)
    found = at = suspect = 0
    while at + 1 < len(words):
        if at >= suspect and at + 33 <= len(words):  # skip 32 words at once if no two are zero
            zeros = 0
            for i in range(32):
                zeros += (words[at + i] | words[at + i + 1]) == _U64(0)
            if zeros == 0:
                at += 32
                continue
            suspect = at + 32
        if words[at] | words[at + 1]:
            at += 2 if words[at + 1] else 1
            continue
        start = 2 * at
        if start > 0 and quads[start - 1] == 0:
            start -= 1
        while at < len(words) and words[at] == _U64(0):
            at += 1
        stop = 2 * at
        if stop < len(quads) and quads[stop] == 0:
            stop += 1
        if start == 0 or data[4 * start - 1]:
            start += 1
        length = 4 * (stop - start)
        runs[found, 0], runs[found, 1] = 4 * start, length - 4 * (length % MAX_MATCH == 2)
        found += 1
    return found


@kernel
def _match_symbol(length: int) -> Any:
    """Return symbol, number of extra bits and their value for a match of 3 to 258 bytes (RFC 1951, 3.2.5)."""
    if length == MAX_MATCH:
        return 285, 0, 0
    above = length - 3
    extra = 0
    while above >> extra >= 8:
        extra += 1
    return 257 + 4 * extra + (above >> extra), extra, above & ((1 << extra) - 1)


@kernel
def histogram(data: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Count the symbols [286] int64 that code `data` with `runs` as matches."""
    tables = np.zeros((4, 256), np.uint32)  # four, as an addition has to wait for the previous one to the same counter
    words = data[: len(data) // 8 * 8].view(np.uint64)
    for word in words:
        for i in range(8):
            tables[i & 3, _U8(word >> _U64(8 * i))] += _U32(1)
    for value in data[8 * len(words) :]:
        tables[0, value] += _U32(1)
    counts = np.zeros(SYMBOLS, np.int64)
    for value in range(256):
        for i in range(4):
            counts[value] += tables[i, value]
    for run in runs:
        counts[0] -= run[1]
        counts[285] += run[1] // MAX_MATCH
        if run[1] % MAX_MATCH:
            counts[_match_symbol(run[1] % MAX_MATCH)[0]] += 1
    return counts


@kernel
def _run_length_code(lengths: np.ndarray) -> Any:
    """Run-length code `lengths` (RFC 1951, 3.2.7) as symbols [t] uint8 and the values of their extra bits [t] uint8."""
    symbols, extras = np.empty(len(lengths), np.uint8), np.empty(len(lengths), np.uint8)
    tokens = at = 0
    while at < len(lengths):
        value, end = lengths[at], at + 1
        while end < len(lengths) and lengths[end] == value:
            end += 1
        first = True  # a length other than 0 has to be written once before it can be repeated
        while at < end:
            left = end - at
            symbol, extra, step = value, 0, 1
            if value == 0 and left >= 11:
                step = min(left, 138)
                symbol, extra = 18, step - 11
            elif value == 0 and left >= 3:
                step = left
                symbol, extra = 17, step - 3
            elif value and not first and left >= 3:
                step = min(left, 6)
                symbol, extra = 16, step - 3
            symbols[tokens], extras[tokens] = symbol, extra
            tokens, at, first = tokens + 1, at + step, False
    return symbols[:tokens], extras[:tokens]


@kernel
def _block_header(lengths: np.ndarray, words: np.ndarray) -> Any:
    """Write the header of a non-final dynamic block into `words` [64] uint64; return the bit stream's state."""
    literals = SYMBOLS
    while lengths[literals - 1] == 0:  # stops at the end-of-block symbol at the latest
        literals -= 1
    sequence = np.ones(literals + 1, np.uint8)  # the last one is that of distance 1, one bit
    sequence[:literals] = lengths[:literals]
    symbols, extras = _run_length_code(sequence)
    counts = np.zeros(19, np.int64)
    for symbol in symbols:
        counts[symbol] += 1
    meta = code_lengths(counts, 7)
    codes = canonical_codes(meta)
    n = 19
    while meta[_LENGTH_ORDER[n - 1]] == 0:
        n -= 1
    state = _put(words, (_U64(0), _U64(0), _U64(0)), 0b100, 3)  # not final, dynamic codes
    state = _put(words, state, (literals - 257) | 0 << 5 | (n - 4) << 10, 14)
    for i in range(n):
        state = _put(words, state, meta[_LENGTH_ORDER[i]], 3)
    for i in range(len(symbols)):
        state = _put_code(words, state, codes[symbols[i]])
        if symbols[i] >= 16:
            state = _put(words, state, extras[i], _REPEAT_BITS[symbols[i] - 16])
    return _flush(words, state)


@kernel
def _match_codes(codes: np.ndarray) -> np.ndarray:
    """Return the codes [259] uint32 of matches by length, packed as `codes`; extra bits and distance 1 are included."""
    matches = np.zeros(MAX_MATCH + 1, np.uint32)
    for length in range(3, MAX_MATCH + 1):
        symbol, extra, value = _match_symbol(length)
        code_length = codes[symbol] >> _U32(24)
        matches[length] = codes[symbol] + (value << code_length) + ((extra + 1) << 24)
    return matches


@kernel
def _put_run(words: np.ndarray, state: Any, length: int, matches: np.ndarray) -> Any:
    """Append matches that cover `length` bytes together."""
    while length > MAX_MATCH:
        state = _put_code(words, state, matches[MAX_MATCH])
        length -= MAX_MATCH
    return _put_code(words, state, matches[length])


@kernel
def _coded_bits(counts: np.ndarray, lengths: np.ndarray, runs: np.ndarray) -> int:
    """Return the number of bits that all symbols, extra bits and distances need."""
    bits = 0
    for symbol in range(SYMBOLS):
        bits += counts[symbol] * lengths[symbol]
    for run in runs:
        bits += run[1] // MAX_MATCH + 1 + _match_symbol(max(run[1] % MAX_MATCH, 3))[1]
    return bits


@kernel
def _align(words: np.ndarray, state: Any) -> int:
    """End the bit stream on a byte with an empty stored block (000, padding, 00 00 FF FF); return its bytes."""
    state = _put(words, state, 0, 3)
    full, _, filled = _flush(words, state)
    end = 8 * full + (filled + _U64(7)) // _U64(8)
    tail = words.view(np.uint8)[end : end + _U64(4)]
    tail[0] = tail[1] = 0
    tail[2] = tail[3] = 255
    return end + _U64(4)


@kernel
def deflate(data: np.ndarray, runs: np.ndarray, pairs: np.ndarray, words: np.ndarray) -> int:
    """Compress `data` [n] uint8 into `words` as non-final blocks that end on a byte; return the number of bytes.

    Returns 0 if stored blocks would not be larger.

    Args:
        data: the bytes to compress.
        runs: scratch [n // 16 + 1, 2] int64.
        pairs: scratch [65536] uint32.
        words: output uint64, with room for n + 64 bytes.
    """
    found = find_runs(data, runs)
    counts = histogram(data, runs[:found])
    blocks = (len(data) + BLOCK_BYTES - 1) // BLOCK_BYTES
    counts[END_OF_BLOCK] = blocks
    lengths = code_lengths(counts, LITERAL_BITS)
    header = np.zeros(64, np.uint64)
    header_words, _, header_bits = _block_header(lengths, header)
    bits = blocks * (64 * int(header_words) + int(header_bits)) + _coded_bits(counts, lengths, runs[:found])
    if bits // 8 + 6 >= len(data):
        return 0

    codes = canonical_codes(lengths)
    matches = _match_codes(codes)
    _pair_codes(codes, pairs)
    runs[found, 0], runs[found, 1] = len(data), 0  # sentinel
    state = _U64(0), _U64(0), _U64(0)
    at = block_end = 0
    block_bytes = (len(data) // blocks + 4) // 4 * 4
    for run in runs[: found + 1]:
        while at < run[0]:
            if at >= block_end:
                if at:
                    state = _put_code(words, state, codes[END_OF_BLOCK])
                for i in range(header_words):
                    state = _put(words, _put(words, state, header[i] & _U64(0xFFFFFFFF), 32), header[i] >> _U64(32), 32)
                state = _put(words, state, header[header_words], header_bits)
                block_end = at + block_bytes
            stop = min(run[0], block_end)
            state = _put_literals(words, state, data, at, stop, codes, pairs)
            at = stop
        state = _put_run(words, state, run[1], matches)
        at += run[1]
    return _align(words, _put_code(words, state, codes[END_OF_BLOCK]))
