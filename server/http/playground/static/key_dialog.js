// The dialog that asks for an API key.

const KEY = /^[A-Za-z0-9._~+/=-]+$/; // the characters that the server accepts in its file of keys

/** Return a function that opens `dialog` and returns the key, or null if the person cancels. */
export function keyDialog(dialog) {
    const field = dialog.querySelector("input");
    const message = dialog.querySelector("#key-message");
    dialog.querySelector("#key-cancel").addEventListener("click", () => dialog.close(""));
    dialog.querySelector("form").addEventListener("submit", (event) => {
        event.preventDefault();
        const key = field.value.trim();
        if (KEY.test(key)) {
            dialog.close(key);
        } else {
            message.textContent = "The key contains a character, perhaps an invisible one, that is not allowed in keys.";
            field.focus();
        }
    });
    return (hadKey) => {
        message.textContent = hadKey ? "The server does not accept the last key." : "";
        field.value = "";
        dialog.returnValue = "";
        dialog.showModal();
        return new Promise((resolve) => {
            dialog.addEventListener("close", () => resolve(dialog.returnValue || null), { once: true });
        });
    };
}
