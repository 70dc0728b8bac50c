"use strict";
// The slider: two pictures of the grid, one over the other, cut where the handle is.
(() => {
  const slider = document.getElementById("slider");
  if (!slider) return;
  const get = (id) => document.getElementById(id);
  const [row, left, right, cut, stage] = ["pick-row", "pick-left", "pick-right", "cut", "stage"].map(get);
  const cell = (r, c) => document.querySelector(`.cell[data-row="${r}"][data-column="${c}"]`);

  const show = () => {
    for (const [select, side, other, end] of [[left, "left", right, 0], [right, "right", left, -1]]) {
      for (const option of select.options) option.disabled = !cell(row.value, option.value);
      // A picture that this row lacks makes way for its first on the left and its last on the right, never the other's.
      const free = [...select.options].filter((o) => !o.disabled && o.value !== other.value);
      if (select.selectedOptions[0].disabled) select.value = free.at(end).value;
      const source = cell(row.value, select.value).querySelector("img");
      const image = get(`image-${side}`);
      image.src = source.src;
      image.alt = source.alt;
      image.classList.toggle("pixels", source.closest(".cell").classList.contains("small"));
      get(`tag-${side}`).textContent = select.selectedOptions[0].textContent;
      if (side === "left") stage.style.setProperty("--ratio", source.getAttribute("width") / source.getAttribute("height"));
    }
    for (const button of document.querySelectorAll(".cell")) {
      const shown = button.dataset.row === row.value && [left.value, right.value].includes(button.dataset.column);
      button.classList.toggle("shown", shown);
    }
  };
  const move = () => {
    stage.style.setProperty("--cut", `${cut.value}%`);
    cut.setAttribute("aria-valuetext", `${cut.value} % ${get("tag-left").textContent}`);
  };
  const drag = (event) => {
    const box = stage.getBoundingClientRect();
    cut.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    move();
  };

  left.value = slider.dataset.left;
  right.value = slider.dataset.right;
  for (const select of [row, left, right]) select.addEventListener("change", () => { show(); move(); });
  cut.addEventListener("input", move);
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
    event.preventDefault();
    cut.focus({ preventScroll: true });
  });
  stage.addEventListener("pointermove", (event) => { if (stage.hasPointerCapture(event.pointerId)) drag(event); });
  get("pictures").addEventListener("click", (event) => {
    const button = event.target.closest(".cell");
    if (!button || ![...row.options].some((o) => o.value === button.dataset.row)) return;
    row.value = button.dataset.row;
    if (button.dataset.column !== left.value) right.value = button.dataset.column;
    show();
    move();
    slider.scrollIntoView({ block: "nearest" });
  });
  slider.hidden = false;
  show();
  move();
})();
