// Applies the theme that was chosen earlier before the page is drawn; modules run later. theme.js has the rest.

try {
    const theme = localStorage.getItem("pid-theme");
    if (theme !== null) {
        document.documentElement.dataset.theme = theme;
    }
} catch {} // the browser blocks the storage of sites
