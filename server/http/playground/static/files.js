// Files of latents: .npy (NumPy enhancement proposal 1) and .safetensors.

import { fromFloat16, toFloat16 } from "./latents.js";

const MEBIBYTE = 2 ** 20; // bytes
const LARGEST_FILE = 256; // MiB
const NPY = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // "\x93NUMPY"
const NPY_HEADER = 128; // bytes of the header of a file that is written here
const NPY_TYPES = { "<f2": "F16", "<f4": "F32", "<f8": "F64" };

/** A file that cannot be used; the message is for the person who chose it. */
export class FileError extends Error {}

/**
 * Return the latent { shape, data } in a file, or null if it has neither of the two formats.
 *
 * `others` has the names of the other tensors in the file, as text.
 */
export async function readLatent(file) {
    const size = file.size / MEBIBYTE;
    if (size > LARGEST_FILE) {
        throw new FileError(`The file has ${Math.ceil(size)} MiB. The page reads files of up to ${LARGEST_FILE} MiB.`);
    }
    const bytes = new Uint8Array(await file.arrayBuffer());
    if (NPY.every((byte, index) => bytes[index] === byte)) {
        return readNpy(bytes);
    }
    return file.name.toLowerCase().endsWith(".safetensors") ? readSafetensors(bytes) : null;
}

/** Return a latent as a float16 .npy file. */
export function writeNpy({ shape, data }) {
    const text = `{'descr': '<f2', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
    const length = NPY_HEADER - 10; // without magic number, version and this length
    const header = `${text.padEnd(length - 1)}\n`;
    const bytes = new Uint8Array(NPY_HEADER + 2 * data.length);
    bytes.set([...NPY, 1, 0, length, 0]);
    bytes.set(new TextEncoder().encode(header), 10);
    const view = new DataView(bytes.buffer, NPY_HEADER);
    toFloat16(data).forEach((bits, index) => view.setUint16(2 * index, bits, true));
    return bytes;
}

function readNpy(bytes) {
    const view = new DataView(bytes.buffer);
    const wide = bytes[6] > 1; // from version 2 on, the length of the header has 4 bytes
    const start = wide ? 12 : 10;
    if (bytes.length < start) {
        throw new FileError("The .npy file is incomplete.");
    }
    const end = start + (wide ? view.getUint32(8, true) : view.getUint16(8, true));
    const header = new TextDecoder().decode(bytes.subarray(start, end));
    const descr = header.match(/'descr':\s*'([^']*)'/)?.[1];
    const shape = header.match(/'shape':\s*\(([\d\s,]*)\)/)?.[1];
    if (!(descr in NPY_TYPES) || shape === undefined || /'fortran_order':\s*True/.test(header)) {
        throw new FileError("The .npy file must contain float16, float32 or float64 values in C order.");
    }
    const sides = shape.split(",").filter((side) => side.trim()).map(Number);
    return { ...readTensor(bytes.subarray(end), NPY_TYPES[descr], sides), others: "" };
}

function readSafetensors(bytes) {
    const damaged = new FileError("The .safetensors file is damaged or incomplete.");
    let start;
    let tensors;
    let names;
    try {
        start = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
        tensors = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
        names = Object.keys(tensors).filter((name) => name !== "__metadata__");
    } catch {
        throw damaged;
    }
    if (!names.includes("latent")) {
        throw new FileError(`The file has no tensor named “latent”, only: ${listed(names) || "none"}.`);
    }
    const { dtype, shape, data_offsets: offsets } = tensors.latent ?? {};
    if (!isListOfSizes(shape) || !isListOfSizes(offsets)) {
        throw damaged;
    }
    const [from, to] = offsets;
    const others = listed(names.filter((name) => name !== "latent"));
    return { ...readTensor(bytes.subarray(start + from, start + to), dtype, shape), others };
}

function listed(names) {
    const [shown, more] = [names.slice(0, 5).join(", "), names.length - 5];
    return more > 0 ? `${shown} and ${more} more` : shown;
}

function isListOfSizes(list) {
    return Array.isArray(list) && list.every((size) => Number.isSafeInteger(size) && size >= 0);
}

/** Return a latent from little-endian elements. */
function readTensor(bytes, type, shape) {
    const readers = {
        F16: [2, (view, count) => fromFloat16(read(count, (index) => view.getUint16(2 * index, true)))],
        BF16: [2, (view, count) => fromBfloat16(read(count, (index) => view.getUint16(2 * index, true)))],
        F32: [4, (view, count) => Float32Array.from(read(count, (index) => view.getFloat32(4 * index, true)))],
        F64: [8, (view, count) => Float32Array.from(read(count, (index) => view.getFloat64(8 * index, true)))],
    };
    if (!(type in readers)) {
        throw new FileError(`The latent has the type ${type}. It must be float16, bfloat16 or float32.`);
    }
    const [size, convert] = readers[type];
    const count = shape.reduce((product, side) => product * side, 1);
    if (bytes.length < size * count) {
        throw new FileError("The file is incomplete: it has fewer values than its header says.");
    }
    const data = convert(new DataView(bytes.buffer, bytes.byteOffset, size * count), count);
    if (!data.every(Number.isFinite)) {
        throw new FileError("The latent contains values that are not finite numbers.");
    }
    return { shape, data };
}

function read(count, value) {
    return Array.from({ length: count }, (_, index) => value(index));
}

function fromBfloat16(bits) {
    return new Float32Array(Uint32Array.from(bits, (value) => value << 16).buffer);
}
