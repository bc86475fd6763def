// The colour theme: that of the system, unless the person chooses the other one.

import { forBrowser } from "./storage.js";

const KEY = "pid-theme"; // also in early_theme.js
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

/** Let `button` switch between the themes. The choice is kept in this browser, and applied by early_theme.js. */
export function mount(button) {
    const root = document.documentElement;
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
    const show = () => (button.textContent = isDark() ? "Light theme" : "Dark theme");
    button.addEventListener("click", () => {
        root.dataset.theme = isDark() ? "light" : "dark";
        forBrowser.set(KEY, root.dataset.theme);
        show();
    });
    systemIsDark.addEventListener("change", show);
    show();
}
