// Dark or light: by the system, or as chosen in the settings. A plain script, so that it runs before the first paint.

(() => {
  const PAPER = { light: "#faf9f6", dark: "#16181c" }; // as in style/base.css, for the bars of a phone
  const systemDark = matchMedia("(prefers-color-scheme: dark)");

  function show() {
    const theme = localStorage.getItem("porcelet.theme");
    const dark = theme ? theme === "dark" : systemDark.matches;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    document.querySelector("meta[name=theme-color]").content = dark ? PAPER.dark : PAPER.light;
  }

  show();
  systemDark.addEventListener("change", show);
  addEventListener("themechange", show);
})();
