// The sidebar: a column that can be hidden; on a phone a drawer over the page, which is out of reach meanwhile.

import { byId } from "./dom.js";
import { stored } from "./preferences.js";

const narrow = matchMedia("(max-width: 52rem)"); // as in style/layout.css

/** {toggle(), open(), closeDrawer() → whether one was open}. */
export function createSidebar() {
  const [sidebar, main, shade] = [byId("sidebar"), byId("main"), byId("shade")];
  const toggles = document.querySelectorAll(".toggle-sidebar");
  let shown = !narrow.matches && stored.sidebar !== "hidden";

  function show(wanted) {
    shown = wanted;
    sidebar.hidden = !shown;
    shade.hidden = !(shown && narrow.matches);
    main.inert = shown && narrow.matches;
    document.body.classList.toggle("with-sidebar", shown);
    toggles.forEach((button) => button.setAttribute("aria-expanded", shown));
  }

  function set(wanted) {
    show(wanted);
    if (!narrow.matches) stored.sidebar = wanted ? null : "hidden";
    const target = wanted ? sidebar : main;
    if (narrow.matches || !document.activeElement.checkVisibility()) target.querySelector(".toggle-sidebar").focus();
  }

  function closeDrawer() {
    const isDrawer = narrow.matches && shown;
    if (isDrawer) set(false);
    return isDrawer;
  }

  toggles.forEach((button) => button.addEventListener("click", () => set(!shown)));
  shade.addEventListener("click", closeDrawer);
  narrow.addEventListener("change", () => show(!narrow.matches && stored.sidebar !== "hidden"));
  show(shown);
  return { toggle: () => set(!shown), open: () => shown || set(true), closeDrawer };
}
