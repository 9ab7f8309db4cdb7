// One picture: a slice of a scene on a canvas, with what lies over it.
//
// A picture has the patient's right, or anterior, on its left and anterior, or superior, on top: both of its axes run
// against the volume's. A `pane` is what a picture is drawn into: { context, scene, plane, at, ratio }, `ratio` being
// the screen's pixels per CSS pixel.

const COLOURS = { fixed: "#56b4e9", warped: "#ffb000", grid: "#ffe27a", cross: "#7fd4c1", edge: "#ffffff", fold: "#ff2bd6" };
const DARKER = [86, 160, 255], BRIGHTER = [255, 160, 64]; // differences
const SHRUNK = [70, 140, 255], GROWN = [255, 90, 60]; // Jacobian
const DIMMED = 0.55; // of an image under a grid or colours

/**
 * Draw a picture.
 *
 * `layers` paint a voxel each, as `grey` and `difference` do; the second one begins at `show.wipe`, a part of the width.
 * `labels` is the image whose labels belong to the picture. `show` says what lies over it.
 */
function drawPicture(pane, { layers, labels }, show) {
  const { context } = pane, { width, height } = context.canvas;
  const edge = layers.length > 1 ? show.wipe * width : width;
  context.imageSmoothingQuality = "high";
  layers.forEach((layer, i) => {
    context.save();
    context.beginPath();
    context.rect(i ? edge : 0, 0, width, height);
    context.clip();
    context.drawImage(paintSlice(pane, layer, show), 0, 0, width, height);
    context.restore();
  });
  if (show.folds) drawFolds(pane);
  if (show.grid) drawGrid(pane);
  if (show.labels && labels !== "moving") drawOutlines(pane, "warped");
  if (show.labels) drawOutlines(pane, "fixed");
  if (show.crosshair) drawCrosshair(pane);
  if (edge < width) drawEdge(pane, edge);
}

// ---- What a voxel looks like: functions that fill in its red, green and blue

function grey({ volumes }, name) {
  return (voxel, rgb) => rgb.fill(volumes[name][voxel]);
}

/** An image less the fixed one: black where they are alike. */
function difference({ volumes }, name) {
  return (voxel, rgb) => {
    const step = (volumes[name][voxel] - volumes.fixed[voxel]) / 255, colour = step > 0 ? BRIGHTER : DARKER;
    for (let c = 0; c < 3; c++) rgb[c] = colour[c] * Math.min(1, 1.5 * Math.abs(step));
  };
}

/** Colours of det J over what is there: clear where the volume stays, strong where it changes much. */
function blendJacobian(scene, voxel, rgb) {
  const [low, high] = scene.jacobian_limits, value = determinantOf(scene, Math.max(scene.volumes.jacobian[voxel], 1));
  const amount = value < 1 ? (1 - value) / (1 - low) : (value - 1) / (high - 1), colour = value < 1 ? SHRUNK : GROWN;
  for (let c = 0; c < 3; c++) rgb[c] += (colour[c] - rgb[c]) * 0.9 * amount;
}

/** A slice, a pixel a voxel. */
function paintSlice({ scene, plane, at }, layer, show) {
  const { shape, strides } = scene, width = shape[plane.along], height = shape[plane.up];
  const image = new ImageData(width, height), rgb = [0, 0, 0], dim = show.grid || show.jacobian ? DIMMED : 1;
  let pixel = 0;
  for (let up = height - 1; up >= 0; up--) {
    for (let along = width - 1; along >= 0; along--, pixel += 4) {
      const voxel = at[plane.across] * strides[plane.across] + along * strides[plane.along] + up * strides[plane.up];
      layer(voxel, rgb);
      for (let c = 0; c < 3; c++) rgb[c] *= dim;
      if (show.jacobian) blendJacobian(scene, voxel, rgb);
      image.data.set([...rgb, 255], pixel);
    }
  }
  const canvas = element("canvas", { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// ---- What lies over it

function line(context, x, y, toX, toY) {
  context.moveTo(x, y);
  context.lineTo(toX, toY);
}

function stroke({ context, ratio }, colour, width, path) {
  context.beginPath();
  path();
  Object.assign(context, { strokeStyle: colour, lineWidth: width * ratio });
  context.stroke();
}

/** From a place between 0 and 1 along the volume's axes to the canvas. */
function onCanvas({ context }, along, up) {
  return [(1 - along) * context.canvas.width, (1 - up) * context.canvas.height];
}

function drawCrosshair(pane) {
  const { context, scene, plane, at, ratio } = pane, { width, height } = context.canvas, gap = 8 * ratio;
  const part = (axis) => (at[axis] + 0.5) / scene.shape[axis];
  const [x, y] = onCanvas(pane, part(plane.along), part(plane.up));
  stroke(pane, COLOURS.cross, 1, () => {
    line(context, 0, y, x - gap, y);
    line(context, x + gap, y, width, y);
    line(context, x, 0, x, y - gap);
    line(context, x, y + gap, x, height);
  });
}

/** Where the first image of two ends, with a knob to take hold of. */
function drawEdge(pane, x) {
  const { context, ratio } = pane, { height } = context.canvas;
  stroke(pane, COLOURS.edge, 1.5, () => line(context, x, 0, x, height));
  context.beginPath();
  context.arc(x, 0.8 * height, 7 * ratio, 0, 2 * Math.PI);
  context.fillStyle = COLOURS.edge;
  context.fill();
}

/** A mark on every voxel that folds, sharp where the image is smooth. */
function drawFolds(pane) {
  const { context, scene, plane, at } = pane, { along, up } = plane;
  const width = scene.shape[along], height = scene.shape[up];
  const size = [context.canvas.width / width, context.canvas.height / height], place = [...at];
  context.fillStyle = COLOURS.fold;
  for (place[along] = 0; place[along] < width; place[along]++) {
    for (place[up] = 0; place[up] < height; place[up]++) {
      if (scene.volumes.jacobian[voxelAt(scene, place)] !== 0) continue;
      context.fillRect(...onCanvas(pane, (place[along] + 1) / width, (place[up] + 1) / height), ...size);
    }
  }
}

/** Lines of a regular grid at the places where the deformation reads the moving image. */
function drawGrid(pane) {
  const { context, scene, plane, at } = pane, { along, up, across } = plane;
  const sizes = scene.field.shape, apart = Math.max(...scene.extent) / scene.grid_lines;  // mm
  const every = sizes.map((size, axis) => Math.max(1, Math.round(apart * size / scene.extent[axis])));
  const sample = [0, 0, 0];
  sample[across] = nearestSample(scene, across, at[across]);
  const point = (i, j) => {
    [sample[along], sample[up]] = [i, j];
    const moved = deformationAt(scene, sample);
    const part = (axis) => (sampleStands(scene, axis, sample[axis]) + moved[axis]) / scene.extent[axis];
    return onCanvas(pane, part(along), part(up));
  };
  stroke(pane, COLOURS.grid, 1, () => {
    for (let i = 0; i < sizes[along]; i += every[along]) {
      for (let j = 1; j < sizes[up]; j++) line(context, ...point(i, j - 1), ...point(i, j));
    }
    for (let j = 0; j < sizes[up]; j += every[up]) {
      for (let i = 1; i < sizes[along]; i++) line(context, ...point(i - 1, j), ...point(i, j));
    }
  });
}

/** Outlines of the labels of an image, where it has any: in every square of four voxels that differ. */
function drawOutlines(pane, name) {
  const { scene, plane, at } = pane, labels = scene.volumes[`${name}_labels`];
  if (!labels) return;
  const width = scene.shape[plane.along], height = scene.shape[plane.up], base = at[plane.across] * scene.strides[plane.across];
  const label = (i, j) => labels[base + i * scene.strides[plane.along] + j * scene.strides[plane.up]];
  const point = (i, j) => onCanvas(pane, (i + 0.5) / width, (j + 0.5) / height);
  stroke(pane, COLOURS[name], 1.5, () => {
    for (let i = 0; i + 1 < width; i++) {
      for (let j = 0; j + 1 < height; j++) {
        const corners = [label(i, j), label(i + 1, j), label(i + 1, j + 1), label(i, j + 1)];
        if (corners.some((corner) => corner !== corners[0])) outlineSquare(pane.context, corners, i, j, point);
      }
    }
  });
}

/** Joins the middles of a square's sides whose ends differ, through its own middle where more than two labels meet. */
function outlineSquare(context, [a, b, c, d], i, j, point) {
  const sides = [];
  if (a !== b) sides.push(point(i + 0.5, j));
  if (b !== c) sides.push(point(i + 1, j + 0.5));
  if (c !== d) sides.push(point(i + 0.5, j + 1));
  if (d !== a) sides.push(point(i, j + 0.5));
  const hub = sides.length === 2 ? sides.pop() : point(i + 0.5, j + 0.5);
  for (const side of sides) line(context, ...side, ...hub);
}
