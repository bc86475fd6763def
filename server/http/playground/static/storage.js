// Web storage, or the memory of the page where the browser forbids web storage.

const inMemory = new Map();

/** What the browser keeps until the tab is closed. */
export const forTab = storage(() => sessionStorage);

/** What the browser keeps for later visits. */
export const forBrowser = storage(() => localStorage);

function storage(open) {
    try {
        const stored = open(); // throws if the browser blocks the storage of sites
        return {
            get: (name) => stored.getItem(name),
            set: (name, value) => stored.setItem(name, value),
        };
    } catch {
        return { get: (name) => inMemory.get(name) ?? null, set: (name, value) => inMemory.set(name, value) };
    }
}
