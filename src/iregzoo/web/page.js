// The figures, the iterations, and the start of it all.

const svg = (tag, attributes, text = "") => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
};

function showWarnings(warnings) {
  const note = element("div", { className: `note ${warnings.length ? "worrying" : "calm"}` });
  if (warnings.length) {
    note.setAttribute("role", "alert");
    note.append(element("strong", { textContent: warnings.length > 1 ? `⚠ ${warnings.length} warnings` : "⚠ Warning" }));
    note.append(element("ul", {}, ...warnings.map((words) => element("li", { textContent: words }))));
  } else {
    note.append(element("strong", { textContent: "No warnings. " }), "This is no guarantee: check the images.");
  }
  byId("warnings").append(note);
}

function showLines(lines) {
  for (const { name, value, meaning, worrying } of lines) {
    const flag = worrying ? [element("span", { className: "flag", textContent: "⚠", title: "warning sign" })] : [];
    const cells = [element("th", { scope: "row" }, ...flag, name), element("td", {}, value), element("td", {}, meaning)];
    byId("lines").tBodies[0].append(element("tr", { className: worrying ? "worrying" : "" }, ...cells));
  }
}

function showOverlap(after, before = {}) {
  if (!after) return;
  byId("overlap").hidden = false;
  const labels = Object.keys({ ...before, ...after }).sort((a, b) => a - b);
  const number = (value) => (value === undefined ? "–" : value.toFixed(3));
  for (const label of labels) {
    const fell = after[label] < before[label];
    const filled = element("i"), mark = element("u", { title: "before" });
    filled.style.width = `${100 * (after[label] ?? 0)}%`;
    mark.style.left = `${100 * (before[label] ?? 0)}%`;
    const name = element("th", { scope: "row" }, fell ? `⚠ ${label}` : label);
    const cells = [number(before[label]), number(after[label]), element("span", { className: "overlap" }, filled, mark)];
    const row = element("tr", { className: fell ? "worrying" : "" }, name, ...cells.map((cell) => element("td", {}, cell)));
    byId("dice").tBodies[0].append(row);
  }
}

/** What each level of the pyramid tried, and how much of it was taken. */
function showIterations({ scores, iterations, aligned, network_left_out }) {
  const levels = scores.map((level, i) => ({ level, taken: Math.min(iterations[i], level.length), name: i + 1 }));
  const scored = levels.filter(({ level }) => level.length);
  byId("trace-note").textContent = !iterations.length
    ? aligned ? "None: the scans were aligned without a network."
      : "None recorded: single-pass methods do not iterate, and runs through MONAI do not record iterations."
    : scored.length
      ? "The controller's score (higher is more similar) after every step tried, level by level from coarse to fine. " +
        "Filled: accepted. Open: tried and rejected."
      : "A fixed number of steps at each level; no scores were computed.";
  if (network_left_out) byId("trace-note").textContent += " What they found was left out in the end.";
  if (scored.length) byId("trace").append(chart(scored));
  const end = iterations.length;
  byId("trace-words").append(...iterations.map((count, i) => {
    const tried = scores[i]?.length ? `, ${scores[i].length} tried, score ${scores[i].map((s) => s.toFixed(3)).join(", ")}` : "";
    const where = i === 0 ? " (coarsest)" : i === end - 1 ? " (finest)" : "";
    return element("li", { textContent: `Level ${i + 1}${where}: ${count} accepted${tried}` });
  }));
}

function chart(levels) {
  const width = 720, height = 240, left = 52, right = 12, top = 14, bottom = 40;
  const steps = levels.reduce((sum, { level }) => sum + level.length + 1, 0);
  const all = levels.flatMap(({ level }) => level), low = Math.min(...all), high = Math.max(...all);
  const room = Math.max(high - low, 0.01) * 0.08;
  const x = (step) => left + ((step + 0.5) / steps) * (width - left - right);
  const y = (score) => top + ((high + room - score) / (high - low + 2 * room)) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Score after every step, by level" });
  for (const score of [low, (low + high) / 2, high]) {
    picture.append(svg("path", { class: "axis", d: `M${left} ${y(score)}H${width - right}` }));
    picture.append(svg("text", { x: left - 8, y: y(score) + 4, "text-anchor": "end" }, score.toFixed(3)));
  }
  let begin = 0;
  for (const { level, taken, name } of levels) {
    const at = (i) => `${x(begin + i)} ${y(level[i])}`;
    const kept = level.map((_, i) => i).filter((i) => i < taken);
    if (kept.length > 1) picture.append(svg("path", { class: "path", d: `M${kept.map(at).join("L")}` }));
    for (let i = Math.max(taken, 1); i < level.length; i++) picture.append(svg("path", { class: "try", d: `M${at(i - 1)}L${at(i)}` }));
    level.forEach((score, i) => {
      const dot = svg("circle", { class: i < taken ? "taken" : "left", cx: x(begin + i), cy: y(score), r: 4.5 });
      dot.append(svg("title", {}, `level ${name}, step ${i + 1}: ${score.toFixed(4)}, ${i < taken ? "accepted" : "rejected"}`));
      picture.append(dot);
    });
    const centre = x(begin + (level.length - 1) / 2);
    picture.append(svg("text", { x: centre, y: height - 16, "text-anchor": "middle" }, `level ${name}`));
    begin += level.length + 1;
    if (begin < steps) picture.append(svg("path", { class: "axis", d: `M${x(begin - 1)} ${top}V${height - bottom}` }));
  }
  return picture;
}

function showOrigin(report, views) {
  const size = (shape, spacing) => `${shape.join(" × ")} voxels of ${spacing.map((mm) => +mm.toFixed(2)).join(" × ")} mm`;
  const facts = {
    "Fixed scan": report.fixed,
    "Moving scan": report.moving,
    Method: report.bundle && `${report.bundle} ${report.bundle_version ?? ""}`,
    Alignment: report.aligned,
    Weights: report.weights && report.weights + (report.weights_chosen_for ? ` (both scans show ${report.weights_chosen_for})` : ""),
    "Weights' SHA-256": report.weights_sha256,
    "SHA-256 of what looks for brains": report.finder_sha256,
    Device: report.device,
    iregzoo: report.iregzoo,
    "Network input": report.network_shape && size(report.network_shape, report.network_spacing_mm),
    "Affine, LPS mm": report.affine_lps_mm.slice(0, 3).map((row) => row.map((v) => v.toFixed(3)).join("  ")).join(" | "),
  };
  for (const [name, fact] of Object.entries(facts)) {
    if (fact) byId("origin").append(element("dt", { textContent: name }), element("dd", { textContent: fact }));
  }
  const convention = "Radiological convention: the patient's right is on the left of the picture. ";
  const coarser = views.shape.some((voxels, axis) => voxels < views.full_shape[axis]);
  const detail = coarser
    ? `Shown at ${size(views.shape, views.spacing)}, coarser than the scan: for detail, open warped.nii.gz in a viewer. `
    : `Shown at the fixed scan's own ${size(views.shape, views.spacing)}. `;
  const aslant = views.oblique_degrees > 1
    ? `The scan is oblique by ${views.oblique_degrees.toFixed(0)}°: letters mark the nearest side. ` : "";
  byId("resolution").textContent = convention + detail + aslant;
}

function showPage({ names, summary, lines, report, views }) {
  [byId("moving").textContent, byId("fixed").textContent] = names;
  byId("made").textContent = [report.bundle, report.aligned && `${report.aligned} alignment`, report.weights && `weights ${report.weights}`, `affine start ${report.init}`]
    .filter(Boolean).join(" · ");
  byId("summary").append(...summary.map((words) => element("li", { textContent: words })));
  showWarnings(report.warnings);
  showLines(lines);
  showOverlap(report.dice, report.dice_before);
  showIterations(report);
  showOrigin(report, views);
  byId("report").textContent = JSON.stringify(report, null, 2);
  startViewer(views).catch((error) => {
    byId("warnings").append(element("p", { className: "note worrying" },
      `This browser cannot show the images (${error.message}): see report.png, or use a newer browser.`));
  });
}

showPage(JSON.parse(byId("data").textContent));
