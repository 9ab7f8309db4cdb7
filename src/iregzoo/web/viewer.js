// The linked views: six pictures of a scene, at most two a plane, and what steers them.

const NAMES = { fixed: "fixed", warped: "warped", moving: "moving at affine start" };
const BLINK_MS = 700;
const SLICE_PX = 40; // how far a trackpad scrolls to the next slice
const REST_MS = 200; // after such a pause, a wheel's notch or a touch begins anew, with a slice of its own
const EDGE_PX = 12; // how near to the slider's edge a drag takes hold of it

const byId = (id) => document.getElementById(id);

/** An element with properties and children; texts stay texts, whatever is in them. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/**
 * Build the views and show them. `viewer` is { scene, at, swapped, columns, form, scrolled }: `at` is the voxel of the
 * crosshair, `scrolled` how the wheel turned last: across which plane, which way, when, and how far since the last slice.
 */
async function startViewer(views) {
  const scene = await makeScene(views), form = byId("controls");
  const viewer = { scene, at: [...scene.middle], swapped: false, columns: [], form, scrolled: {} };
  viewer.columns = scene.planes.map((plane) => makeColumn(viewer, plane));
  byId("planes").append(...viewer.columns.map(({ made }) => made));
  const widths = scene.planes.map(({ along }) => `minmax(0, ${scene.extent[along]}fr)`);
  byId("planes").style.setProperty("--columns", widths.join(" "));
  byId("with-labels").hidden = !scene.labels.length;
  listen(viewer);
  byId("viewer").hidden = false;
  new ResizeObserver(() => refresh(viewer)).observe(byId("planes"));
}

// ---- Making the pictures

function makeColumn(viewer, plane) {
  const { scene } = viewer, count = element("span"), pictures = [makePicture(viewer, plane), makePicture(viewer, plane)];
  const slider = element("input", { type: "range", min: 0, max: scene.shape[plane.across] - 1 });
  slider.setAttribute("aria-label", `${plane.name} slice`);
  slider.addEventListener("input", () => go(viewer, { [plane.across]: Number(slider.value) }));
  const heading = element("header", {}, element("strong", { textContent: plane.name }), count);
  const figures = pictures.map(({ figure }) => figure);
  const made = element("div", { className: "plane", id: plane.name }, heading, ...figures, slider);
  const tallest = Math.max(...scene.planes.map(({ up }) => scene.extent[up]));
  made.style.setProperty("--box", `${scene.extent[plane.along]} / ${tallest}`);
  made.style.setProperty("--own", `${scene.extent[plane.along]} / ${scene.extent[plane.up]}`);
  return { plane, made, slider, count, pictures };
}

function makePicture(viewer, plane) {
  const canvas = element("canvas", { tabIndex: 0 }), caption = element("figcaption");
  canvas.setAttribute("role", "img");
  const letters = [...plane.sides].map((side) => element("b", { textContent: side }));
  const frame = element("div", { className: "frame" }, element("div", { className: "picture" }, canvas, ...letters));
  const act = pointing(viewer, plane, canvas);
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({ preventScroll: true });
    act(event, true);
  });
  canvas.addEventListener("pointermove", (event) => act(event, false));
  canvas.addEventListener("keydown", (event) => onArrow(viewer, plane, event));
  canvas.addEventListener("wheel", (event) => onWheel(viewer, plane, event), { passive: false });
  return { plane, canvas, caption, figure: element("figure", {}, frame, caption) };
}

// ---- What is shown

/** What the form asks for. */
function wishes({ form: { elements } }) {
  const ticked = (name) => elements[name].checked;
  return {
    mode: elements.mode.value,
    other: elements.other.value,
    wipe: Number(elements.wipe.value) / 100,
    ...Object.fromEntries(["labels", "grid", "jacobian", "folds", "crosshair"].map((name) => [name, ticked(name)])),
  };
}

/** The pictures of each plane: see `drawPicture`. */
function picturesOf({ scene, swapped }, { mode, other }) {
  const plain = (name) => ({ caption: NAMES[name], layers: [grey(scene, name)], labels: name });
  const changed = (name, when) => ({ caption: `difference ${when}`, layers: [difference(scene, name)], labels: name });
  const both = { caption: `fixed | ${NAMES[other]}`, layers: [grey(scene, "fixed"), grey(scene, other)], labels: other };
  return {
    side: [plain("fixed"), plain(other)],
    wipe: [both],
    blink: [plain(swapped ? other : "fixed")],
    difference: [changed("moving", "at affine start"), changed("warped", "after")],
  }[mode];
}

function refresh(viewer) {
  const { scene, at } = viewer, show = wishes(viewer), pictures = picturesOf(viewer, show);
  const sum = scene.planes.reduce((total, { along }) => total + scene.extent[along], 0);
  const tallest = Math.max(...scene.planes.map(({ up }) => scene.extent[up]));
  byId("planes").style.setProperty("--pictures", pictures.length);
  byId("planes").style.setProperty("--shape", sum / tallest / pictures.length);
  for (const { plane, slider, count, pictures: places } of viewer.columns) {
    slider.value = at[plane.across];
    count.textContent = `${at[plane.across] + 1} / ${scene.shape[plane.across]}`;
    slider.setAttribute("aria-valuetext", `slice ${at[plane.across] + 1} of ${scene.shape[plane.across]}`);
    places.forEach((place, i) => {
      place.figure.hidden = i >= pictures.length;
      if (i < pictures.length) drawIn(viewer, place, pictures[i], show);
    });
  }
  for (const part of document.querySelectorAll("[data-mode]")) part.hidden = !part.dataset.mode.split(" ").includes(show.mode);
  byId("now").textContent = NAMES[viewer.swapped ? show.other : "fixed"];
  byId("readout").textContent = describe(scene, at);
  byId("legend").replaceChildren(...legend(scene, show));
}

function drawIn({ scene, at }, { plane, canvas, caption }, picture, show) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  drawPicture({ context: canvas.getContext("2d"), scene, plane, at, ratio }, picture, show);
  caption.textContent = picture.caption;
  const slice = `slice ${at[plane.across] + 1} of ${scene.shape[plane.across]}`;
  canvas.setAttribute("aria-label", `${plane.name}, ${picture.caption}, ${slice}`);
}

function legend({ volumes, folds, jacobian_limits: [low, high] }, show) {
  const css = (rgb) => `rgb(${rgb.join()})`;
  const item = (kind, background, words) => {
    const swatch = element("span", { className: kind });
    swatch.style.background = background;
    return element("li", {}, swatch, words);
  };
  const bar = (from, to, words) => item("bar", `linear-gradient(90deg, ${css(from)}, #000, ${css(to)})`, words);
  return [
    show.mode === "difference" && bar(DARKER, BRIGHTER, "darker than fixed · same · brighter"),
    show.labels && volumes.fixed_labels && item("stroke", COLOURS.fixed, "labels of the fixed scan"),
    show.labels && volumes.warped_labels && item("stroke", COLOURS.warped, "labels of the moving scan, warped"),
    show.grid && item("stroke", COLOURS.grid, "deformed regular grid"),
    show.jacobian && bar(SHRUNK, GROWN, `det J ${low} (shrunk to nothing) · 1 (unchanged) · ${high} (expanded)`),
    show.folds && item("block", COLOURS.fold, folds ? `folds: ${folds} of the voxels shown` : "folds: none"),
  ].filter(Boolean);
}

// ---- Moving about

/** Move the crosshair along some axes: { axis: voxel }. */
function go(viewer, places) {
  for (const [axis, voxel] of Object.entries(places)) {
    viewer.at[axis] = Math.min(Math.max(voxel, 0), viewer.scene.shape[axis] - 1);
  }
  refresh(viewer);
}

/** What a pointer does in a picture: take hold of the slider's edge, or take the crosshair along. */
function pointing(viewer, { along, up }, canvas) {
  let holdsEdge = false;
  return (event, begins) => {
    const box = canvas.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    const show = wishes(viewer), near = Math.abs(x - show.wipe) * box.width < EDGE_PX;
    if (begins) holdsEdge = show.mode === "wipe" && near;
    canvas.style.cursor = show.mode === "wipe" && near ? "ew-resize" : "";
    if (!event.buttons) return;
    if (holdsEdge) {
      viewer.form.elements.wipe.value = 100 * x;
      refresh(viewer);
      return;
    }
    const place = (axis, part) => Math.floor((1 - part) * viewer.scene.shape[axis]);
    go(viewer, { [along]: place(along, x), [up]: place(up, (event.clientY - box.top) / box.height) });
  };
}

function onArrow(viewer, { across }, event) {
  const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  go(viewer, { [across]: viewer.at[across] + step });
}

function onWheel(viewer, { across }, event) {
  if (document.activeElement !== event.target || event.ctrlKey) return; // who scrolls past goes on scrolling
  const lines = event.deltaMode !== WheelEvent.DOM_DELTA_PIXEL; // asked first: Firefox then gives lines, one a notch
  if (!event.deltaY) return; // sideways
  event.preventDefault();
  const way = Math.sign(event.deltaY), { scrolled } = viewer;
  const anew = scrolled.across !== across || scrolled.way !== way || event.timeStamp - scrolled.when > REST_MS;
  const far = anew || lines ? SLICE_PX : scrolled.far + Math.abs(event.deltaY);
  viewer.scrolled = { across, way, when: event.timeStamp, far: far % SLICE_PX };
  if (far >= SLICE_PX) go(viewer, { [across]: viewer.at[across] - way });
}

function blink(viewer) {
  viewer.form.elements.mode.value = "blink";
  viewer.swapped = !viewer.swapped;
  refresh(viewer);
}

function listen(viewer) {
  let timer = 0;
  viewer.form.addEventListener("input", () => refresh(viewer));
  viewer.form.addEventListener("submit", (event) => event.preventDefault());
  byId("swap").addEventListener("click", () => blink(viewer));
  byId("play").addEventListener("input", ({ target }) => {
    clearInterval(timer);
    if (target.checked) timer = setInterval(() => wishes(viewer).mode === "blink" && blink(viewer), BLINK_MS);
  });
  for (const button of document.querySelectorAll("[data-place]")) {
    button.addEventListener("click", () => go(viewer, PLACES[button.dataset.place](viewer.scene)));
  }
  byId("viewer").addEventListener("keydown", (event) => {
    const presses = event.target.tagName === "BUTTON" || event.target.type === "checkbox"; // space is theirs
    if (event.key !== " " || presses || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (!event.repeat) blink(viewer); // held down, it would flash
  });
}
