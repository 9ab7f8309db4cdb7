"use strict";
// The volumes of a registration, and what stands at a place in them.
//
// Axes run to right (0), anterior (1) and superior (2), the last one fastest. `at` is a voxel, one number an axis.

const WAYS = [["right", "left"], ["anterior", "posterior"], ["superior", "inferior"]];

/** The bytes that `views.pack` packed. */
async function unpack(text) {
  const letters = atob(text), packed = new Uint8Array(letters.length);
  for (let i = 0; i < packed.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const values = new Uint8Array(await new Response(stream).arrayBuffer());
  for (let i = 1; i < values.length; i++) values[i] += values[i - 1];
  return values;
}

/** What `views.views` gave, its volumes unpacked, with the size of its field of view in mm. */
async function makeScene(views) {
  const names = Object.keys(views.volumes);
  const bytes = await Promise.all(names.map((name) => unpack(views.volumes[name])));
  const field = new Int8Array((await unpack(views.field.data)).buffer);
  return {
    ...views,
    volumes: Object.fromEntries(names.map((name, i) => [name, bytes[i]])),
    field: { ...views.field, data: field, samples: field.length / 3 },
    strides: [views.shape[1] * views.shape[2], views.shape[2], 1],
    extent: views.shape.map((size, axis) => size * views.spacing[axis]),
    folds: bytes[names.indexOf("jacobian")].reduce((count, code) => count + (code === 0), 0),
  };
}

function voxelAt({ strides }, at) {
  return at[0] * strides[0] + at[1] * strides[1] + at[2];
}

/** det J of a voxel's byte, as `views.views` coded it; a fold has the byte 0 and no number. */
function determinantOf({ jacobian_limits: [low, high] }, code) {
  return low + ((code - 1) / 254) * (high - low);
}

/** Where a sample of the field lies along an axis, in mm from the first face of the field of view. */
function sampleStands({ field }, axis, sample) {
  return (sample * field.every[axis] + 0.5) * field.spacing[axis];
}

/** The sample of the field nearest to a voxel along an axis. */
function nearestSample({ field, spacing }, axis, voxel) {
  const millimetres = (voxel + 0.5) * spacing[axis];
  const sample = Math.round((millimetres / field.spacing[axis] - 0.5) / field.every[axis]);
  return Math.min(Math.max(sample, 0), field.shape[axis] - 1);
}

/** The deformation at a sample of the field: mm to right, anterior and superior. */
function deformationAt({ field }, [i, j, k]) {
  const index = (i * field.shape[1] + j) * field.shape[2] + k;
  return [0, 1, 2].map((axis) => field.data[axis * field.samples + index] * field.unit_mm);
}

/** In words: where a voxel is in the patient, and what is there. */
function describe(scene, at) {
  const lps = scene.affine.slice(0, 3).map(([i, j, k, origin]) => i * at[0] + j * at[1] + k * at[2] + origin);
  const place = [-lps[0], -lps[1], lps[2]].map((mm, axis) => `${WAYS[axis][mm < 0 ? 1 : 0]} ${Math.abs(mm).toFixed(1)}`);
  const moved = deformationAt(scene, at.map((voxel, axis) => nearestSample(scene, axis, voxel)));
  const voxel = voxelAt(scene, at), code = scene.volumes.jacobian[voxel];
  const words = [`${place.join(", ")} mm`, `deformation ${Math.hypot(...moved).toFixed(1)} mm`];
  const beyond = code === 255 ? "≥ " : "";
  words.push(code ? `det J ${beyond}${determinantOf(scene, code).toFixed(2)}` : "fold (det J ≤ 0)");
  for (const name of ["fixed", "warped"]) {
    const label = scene.volumes[`${name}_labels`]?.[voxel];
    if (label !== undefined) words.push(`${name} label ${label ? (scene.labels[label - 1] ?? "not among those shown") : "none"}`);
  }
  return words.join(" · ");
}

// Places to go to.
const PLACES = {
  middle: (scene) => [...scene.middle],
  jacobian: ({ volumes, shape }) => unravel(smallest(volumes.jacobian.length, (i) => volumes.jacobian[i]), shape),
  displacement(scene) {
    const { data, samples, shape } = scene.field;
    const length = (i) => Math.hypot(data[i], data[samples + i], data[2 * samples + i]);
    const sample = unravel(smallest(samples, (i) => -length(i)), shape);
    return sample.map((index, axis) => Math.floor(sampleStands(scene, axis, index) / scene.spacing[axis]));
  },
};

/** The index, of so many, with the smallest value. */
function smallest(count, value) {
  let best = 0;
  for (let i = 1; i < count; i++) if (value(i) < value(best)) best = i;
  return best;
}

function unravel(index, shape) {
  return [Math.floor(index / (shape[1] * shape[2])), Math.floor(index / shape[2]) % shape[1], index % shape[2]];
}
