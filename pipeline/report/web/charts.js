"use strict";
// Draws every figure that says what is on it (`data-chart`) with uPlot, in the colours of the style sheet.

const find = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

function short(value, digits = 4) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e9 || size < 1e-4) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(digits)}M`;
  if (size >= 10 ** (digits - 1)) return Math.round(value).toLocaleString("en");
  return String(+value.toPrecision(digits));
}

const LEFT = 58, RIGHT = 26; // of a plot's area
const SIZE = 12, LINE = 1.1; // of letters: whole pixels, for uPlot reads no others, and the height of a line in these
const FONT = `${SIZE}px system-ui, sans-serif`;
const percent = (share) => `${short(100 * share, 3)} %`;

function series(spec, one, index) {
  const stroke = colour(one.colour ?? `s${index % 6}`);
  if (spec.kind === "bars") {
    return {stroke, fill: stroke, width: 0, points: {show: false}, paths: uPlot.paths.bars({size: [0.9, 80], align: 0})};
  }
  if (spec.kind === "scatter") {
    return {stroke, width: 0, paths: () => null, points: {show: true, size: 9, fill: stroke, stroke}};
  }
  return {stroke, width: 1.8, spanGaps: false, points: {show: spec.x.length < 2}};
}

const pen = document.createElement("canvas").getContext("2d");

function folded(text, room) { // lines of a text that is too wide for its bar: "mean-", "ablated"
  pen.font = FONT;
  return pen.measureText(text).width <= room ? [text] : text.split(/(?<=-)| /);
}

function axis(label, scale, spec, room) {
  const line = {stroke: colour("grid"), width: 1};
  const made = {scale, stroke: colour("soft"), grid: line, ticks: {show: false}, font: FONT, lineGap: LINE};
  if (scale === "y") return {...made, size: LEFT, values: (_, ticks) => ticks.map((t) => (t === null ? "" : short(t)))};
  const named = {...made, size: label ? 28 : 30, label, labelSize: 14, gap: 3, labelFont: `italic ${FONT}`};
  if (!spec.ticks) return {...named, values: (_, ticks) => ticks.map((t) => (t === null ? "" : short(t)))};
  const names = new Map(spec.ticks.map(([at, name]) => [at, folded(name, room)]));
  const size = named.size + LINE * SIZE * (Math.max(...[...names.values()].map((lines) => lines.length)) - 1);
  const values = (_, ticks) => ticks.map((t) => names.get(t).join("\n"));
  return {...named, size, grid: {show: false}, splits: () => [...names.keys()], values};
}

function told(spec, at) {
  const lines = spec.series.map((one) => [one.name, one.y[at]]).filter(([, y]) => y !== null && y !== undefined);
  const values = lines.map(([name, y]) => (spec.names ? `${name}: ${short(y)}` : `${name} ${short(y)}`));
  return [spec.names ? spec.names[at] : `${spec.x_label ?? ""} ${short(spec.x[at])}`.trim(), ...values].join(" · ");
}

function marked(plot, spec, room) { // lines at values that something is to be compared with, and the values of few bars
  const ratio = devicePixelRatio, context = plot.ctx;
  context.save();
  context.font = FONT.replace(SIZE, SIZE * ratio);
  context.textAlign = "center";
  for (const [i, [name, at, which]] of (spec.references ?? []).entries()) {
    const across = which === "y", pixel = plot.valToPos(at, which, true), box = plot.bbox;
    context.strokeStyle = context.fillStyle = colour("soft");
    context.setLineDash([4 * ratio, 4 * ratio]);
    context.beginPath();
    context.moveTo(across ? box.left : pixel, across ? pixel : box.top);
    context.lineTo(across ? box.left + box.width : pixel, across ? pixel : box.top + box.height);
    context.stroke();
    if (across) { context.textAlign = "left"; context.fillText(name, box.left + 4 * ratio, pixel - 5 * ratio); }
    else {
      context.textAlign = pixel > box.left + 0.6 * box.width ? "right" : "left";
      const aside = (context.textAlign === "right" ? -5 : 5) * ratio;
      context.fillText(name, pixel + aside, box.top + (1 + LINE * i) * SIZE * ratio);
    }
  }
  context.textAlign = "center";
  if (spec.values) {
    context.fillStyle = colour("ink");
    spec.values.forEach((text, i) => {
      const y = spec.series.map((one) => one.y[i]).find((value) => value !== null);
      const [across, top] = [plot.valToPos(spec.x[i], "x", true), plot.valToPos(y, "y", true)];
      folded(text, room).reverse().forEach((line, above) => {
        context.fillText(line, across, top - (0.5 + LINE * above) * SIZE * ratio);
      });
    });
  }
  context.restore();
}

function range(spec) {
  if (spec.y_log) return undefined;
  return (_, low, high) => {
    const floor = Math.min(low ?? 0, 0);
    const top = Math.max(high ?? 1, ...(spec.references ?? []).filter((one) => one[2] === "y").map((one) => one[1]));
    return [floor, top > floor ? top + 0.1 * (top - floor) : floor + 1];
  };
}

function draw(figure) {
  const spec = JSON.parse(figure.dataset.chart), place = find(".plot", figure), output = find("output", figure);
  place.replaceChildren();
  const bars = spec.kind === "bars", pad = bars ? 0.7 : 0;
  const x = {time: false, distr: spec.x_log ? 3 : 1};
  if (bars || spec.x.length < 2) x.range = () => [spec.x[0] - (pad || 1), spec.x.at(-1) + (pad || 1)];
  if (spec.kind === "scatter" && !spec.x_log) { // no point lies on the edge
    const [low, high] = [spec.x[0], spec.x.at(-1)], aside = Math.max(0.08 * (high - low), 0.02 * Math.abs(high)) || 1;
    x.range = () => [low - aside, high + aside];
  }
  const y = {distr: spec.y_log ? 3 : 1, range: range(spec)};
  const width = Math.max(place.clientWidth, 200);
  const room = (width - LEFT - RIGHT) / (spec.x.at(-1) - spec.x[0] + 2 * pad); // of a bar
  const hooks = {draw: [(plot) => marked(plot, spec, room)]};
  hooks.setCursor = [(plot) => { output.textContent = plot.cursor.idx == null ? "" : told(spec, plot.cursor.idx); }];
  const options = {
    width, height: spec.height ?? 220, padding: [14, RIGHT, 0, 0], hooks,
    scales: {x, y}, legend: {show: false}, axes: [axis(spec.x_label, "x", spec, room), axis("", "y", spec)],
    cursor: {drag: {x: false, y: false}, y: false, points: {show: !bars}},
    series: [{}, ...spec.series.map((one, index) => series(spec, one, index))],
  };
  new uPlot(options, [spec.x, ...spec.series.map((one) => one.y)], place);
}

const drawAll = () => all("figure[data-chart]").filter((figure) => figure.offsetParent).forEach(draw);
let lastWidth = innerWidth, pending = 0;
addEventListener("resize", () => {
  if (innerWidth === lastWidth) return; // a phone's address bar comes and goes
  lastWidth = innerWidth;
  clearTimeout(pending);
  pending = setTimeout(drawAll, 120);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
document.addEventListener("toggle", (event) => { if (event.target.open) drawAll(); }, true);
