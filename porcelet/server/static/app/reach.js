// Letting the keyboard scroll what a mouse could: wide code, tables and formulas, long questions.

const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const overflows = target.scrollWidth > target.clientWidth || target.scrollHeight > target.clientHeight;
    if (overflows) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

/** Let the keyboard reach an element as long as it has something to scroll. */
export function keepReachable(element) {
  sizes.observe(element);
  return element;
}
