"use strict";
// The page of a report. All that comes from files is put into text nodes, never into markup.

const COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#808080"];  // of Okabe and Ito
const STYLES = [["solid", []], ["dashed", [8, 4]], ["dotted", [2, 3]]];
const MARGIN = { left: 58, right: 24, top: 8, bottom: 36 };
const FIRST = ["val_loss", "loss", "val_bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second", "mfu"];
const POLL = 2000;  // milliseconds
const WATCHED = document.querySelector("meta[http-equiv]").content.includes("connect-src 'self'");

const find = (id) => document.getElementById(id);
const state = { x: "steps", logx: false, logy: false, whole: false, mean: false, smooth: 0, zoom: null, cursor: null, hidden: new Set() };
// By group, runs that differ only in their seed, the members' paths: colours stay where the order of runs changes.
const groups = new Map();
const charts = new Map();
const heatmaps = new Map();
let data = JSON.parse(find("data").textContent);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// ---- numbers as text

function number(value, digits = 4) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  for (const [unit, scale] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (size >= scale) return `${+(value / (unit === "k" ? 1e3 : scale)).toPrecision(digits)}${unit}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(digits - 2) : `${+value.toPrecision(digits)}`;
}

function xAxis(last) {
  if (state.x === "steps") return { label: "step", scale: 1 };
  if (state.x === "tokens") return { label: "tokens (positions, padding included)", scale: 1 };
  for (const [unit, scale] of [["h", 3600], ["min", 60]]) {
    if (last > 2 * scale) return { label: `time of the steps (${unit})`, scale };
  }
  return { label: "time of the steps (s)", scale: 1 };
}

function ticks(low, high, log, count) {
  const found = [];
  if (log) {
    const decades = Math.log10(high / low);
    const parts = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const every = Math.max(1, Math.ceil(decades / count));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every) {
      for (const part of parts) found.push(part * 10 ** power);
    }
    const inside = found.filter((tick) => tick >= low && tick <= high);
    if (inside.length > 1) return inside;
  }
  const rough = (high - low) / count;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((part) => part * power >= rough) * power;
  const ticksFound = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticksFound.push(+(i * step).toPrecision(12));
  return ticksFound;
}

// ---- the curves of a run

const cache = new WeakMap();

// Means of what was before, the weights falling with each logged line, not with each value: what is measured rarely is
// hardly smoothed.
function smoothed(places, values) {
  if (!state.smooth) return values;
  let mean = 0, weight = 0;
  return values.map((value, i) => {
    const keep = state.smooth ** (i ? places[i] - places[i - 1] : 1);
    mean = keep * mean + (1 - keep) * value;
    weight = keep * weight + (1 - keep);  // corrects the start, which begins at 0
    return mean / weight;
  });
}

function series(run, metric) {
  const name = JSON.stringify([metric, state.x, state.smooth]);
  if (!cache.has(run)) cache.set(run, new Map());
  const known = cache.get(run);
  if (known.has(name)) return known.get(name);
  if (known.size > 200) known.clear();
  const values = run.metrics[metric] || [], spread = run.spread && run.spread[metric];
  const found = { xs: [], raw: [], ys: [], low: [], high: [] };
  const kept = values.map((_, i) => i).filter((i) => values[i] !== null && run[state.x][i] !== undefined);
  for (const i of kept) {
    found.xs.push(run[state.x][i]);
    found.raw.push(values[i]);
  }
  found.ys = smoothed(kept, found.raw);
  if (spread) [found.low, found.high] = [0, 1].map((side) => smoothed(kept, kept.map((i) => spread[i][side])));
  known.set(name, found);
  return found;
}

function before(xs, x) {  // the number of values that are smaller than x
  let low = 0, high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low;
}

function nearest(xs, x) {
  const i = before(xs, x);
  return i === 0 ? 0 : i === xs.length ? i - 1 : x - xs[i - 1] < xs[i] - x ? i - 1 : i;
}

// A group has a colour, and its members the styles of lines.
const place = (run) => [...groups.keys()].indexOf(run.group);
const member = (run) => Math.max(0, groups.get(run.group).indexOf(run.path));
const color = (run) => COLORS[place(run) % COLORS.length];
const style = (run) => STYLES[(Math.floor(place(run) / COLORS.length) + member(run)) % STYLES.length];

function shownRuns() {
  const runs = data.runs.filter((run) => !state.hidden.has(run.path));
  return state.mean ? [...groups.keys()].map((group) => meanOf(runs.filter((run) => run.group === group))).filter(Boolean) : runs;
}

const means = new WeakMap();

// The mean of runs at the steps that all have, with the lowest and highest value.
function meanOf(runs) {
  if (runs.length < 2) return runs[0];
  const name = runs.map((run) => run.path).join("\n"), known = means.get(runs[0]);
  if (known && known.name === name) return known.mean;
  const rows = runs.map((run) => new Map(run.steps.map((step, i) => [step, i])));
  const steps = runs[0].steps.filter((step) => rows.every((row) => row.has(step)));
  const at = (column, i, step) => column && column[rows[i].get(step)];
  const average = (values) => values.every((value) => typeof value === "number") ? values.reduce((a, b) => a + b) / values.length : null;
  const over = (pick) => steps.map((step) => average(runs.map((run, i) => at(pick(run), i, step))));
  const mean = { ...runs[0], name: `${runs[0].name} and ${runs.length - 1} more, mean`, path: `mean of ${name}`, steps, metrics: {}, spread: {} };
  for (const axis of ["tokens", "seconds"]) mean[axis] = runs.every((run) => run[axis].length) ? over((run) => run[axis]) : [];
  for (const metric of Object.keys(runs[0].metrics)) {
    const pick = (run) => run.metrics[metric];
    mean.metrics[metric] = over(pick);
    mean.spread[metric] = steps.map((step) => runs.map((run, i) => at(pick(run), i, step))).map((values) =>
      average(values) === null ? null : [Math.min(...values), Math.max(...values)]);
  }
  means.set(runs[0], { name, mean });
  return mean;
}

function swatch(run) {
  return element("span", { className: "swatch", style: `border-top-color:${color(run)};border-top-style:${style(run)[0]}` });
}

function wholeRange() {
  let low = Infinity, high = -Infinity;
  for (const run of shownRuns()) {
    for (const x of run[state.x]) {
      if (state.logx && x <= 0) continue;
      low = Math.min(low, x);
      high = Math.max(high, x);
    }
  }
  if (low > high) return null;
  if (!state.logx) low = Math.min(low, 0);
  return low === high ? [low, high + 1] : [low, high];
}

const xRange = () => state.zoom || wholeRange();

// ---- a chart

class Chart {
  constructor(metric) {
    this.metric = metric;
    this.canvas = element("canvas", { tabIndex: 0, role: "slider" });
    this.cursor = element("div", { className: "cursor", hidden: true });
    this.chosen = element("div", { className: "chosen", hidden: true });
    this.tip = element("div", { className: "tip", hidden: true });
    this.caption = element("span");
    this.clipped = element("span", { className: "quiet" });
    this.plot = element("div", { className: "plot" }, this.canvas, this.chosen, this.cursor, this.tip);
    this.node = element("figure", {}, element("figcaption", {}, this.caption, this.clipped), this.plot);
    this.listen();
  }

  // Returns the runs that have the metric, with the part of their curves that is seen.
  visible([left, right]) {
    return shownRuns().map((run) => ({ run, ...series(run, this.metric) })).filter((one) => one.xs.length).map((one) => {
      const start = Math.max(0, before(one.xs, left) - 1), end = Math.min(one.xs.length, before(one.xs, right) + 2);
      return { ...one, start, end };
    });
  }

  // The lowest and highest value. The first twentieth, far from the rest, is cut off unless all is asked for.
  range(seen, [left, right]) {
    const bounds = (from) => {
      let low = Infinity, high = -Infinity;
      for (const { xs, ys, low: under, high: over, start, end } of seen) {
        for (let i = start; i < end; i++) {
          if (xs[i] < from || xs[i] > right || (state.logy && ys[i] <= 0)) continue;
          low = Math.min(low, under.length && !state.logy ? under[i] : ys[i]);
          high = Math.max(high, over.length ? over[i] : ys[i]);
        }
      }
      return [low, high];
    };
    const all = bounds(left), rest = bounds(left + (right - left) / 20);
    const cut = !state.whole && !state.logy && !state.zoom && all[1] - all[0] > 2 * (rest[1] - rest[0]) && rest[1] > rest[0];
    this.clipped.textContent = cut ? "the start is outside: all values shows it" : "";
    let [low, high] = cut ? rest : all;
    if (low > high) return null;
    if (state.logy) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
    const space = low === high ? Math.abs(low) / 10 || 1 : (high - low) / 20;
    return [low - space, high + space];
  }

  draw() {
    const unit = data.units[this.metric];
    this.caption.textContent = this.metric + (unit ? ` (${unit})` : "") + (state.smooth ? ", smoothed" : "") ;
    const box = this.plot.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    if (!box.width) return;
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    const ctx = this.canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    const css = getComputedStyle(document.documentElement), text = css.getPropertyValue("--quiet");
    this.width = box.width - MARGIN.left - MARGIN.right;
    this.height = box.height - MARGIN.top - MARGIN.bottom;
    ctx.font = "12px system-ui, sans-serif";
    ctx.fillStyle = text;
    const xs = this.xs = xRange(), seen = xs ? this.visible(xs) : [], ys = seen.length ? this.range(seen, xs) : null;
    this.seen = seen;
    if (!ys) {
      ctx.fillText("nothing to draw yet", MARGIN.left, 40);
      this.canvas.setAttribute("aria-label", `${this.metric}: nothing to draw yet`);
      return;
    }
    this.axes(ctx, xs, ys, css.getPropertyValue("--line"));
    ctx.save();
    ctx.beginPath();
    ctx.rect(MARGIN.left, MARGIN.top - 2, this.width + 2, this.height + 4);
    ctx.clip();
    for (const one of seen) this.curve(ctx, one);
    ctx.restore();
    const names = seen.map((one) => one.run.name).join(", ");
    this.canvas.setAttribute("aria-label", `${this.metric} of ${names}; arrow keys read values, + and - zoom`);
    this.canvas.setAttribute("aria-valuemin", xs[0]);
    this.canvas.setAttribute("aria-valuemax", xs[1]);
    this.canvas.setAttribute("aria-valuenow", state.cursor === null ? xs[0] : state.cursor);
  }

  axes(ctx, xs, ys, line) {
    const axis = xAxis(xs[1]), scaled = xs.map((x) => x / axis.scale);
    const to = (value, [low, high], log) => log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    this.toX = (x) => MARGIN.left + this.width * to(x, xs, state.logx);
    this.toY = (y) => MARGIN.top + this.height * (1 - to(y, ys, state.logy));
    this.fromX = (pixel) => {
      const part = Math.min(1, Math.max(0, (pixel - MARGIN.left) / this.width));
      return state.logx ? xs[0] * (xs[1] / xs[0]) ** part : xs[0] + part * (xs[1] - xs[0]);
    };
    ctx.strokeStyle = line;
    ctx.lineWidth = 1;
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    for (const tick of ticks(...ys, state.logy, 5)) {
      const y = Math.round(this.toY(tick)) + 0.5;
      ctx.globalAlpha = 0.6;
      ctx.beginPath();
      ctx.moveTo(MARGIN.left, y);
      ctx.lineTo(MARGIN.left + this.width, y);
      ctx.stroke();
      ctx.globalAlpha = 1;
      ctx.fillText(number(tick, 3), MARGIN.left - 6, y);
    }
    ctx.textBaseline = "top";
    ctx.textAlign = "center";
    let free = -Infinity;
    for (const tick of ticks(...scaled, state.logx, Math.max(2, Math.floor(this.width / 80)))) {
      const x = Math.round(this.toX(tick * axis.scale)) + 0.5, label = number(tick, 3), half = ctx.measureText(label).width / 2;
      ctx.beginPath();
      ctx.moveTo(x, MARGIN.top + this.height);
      ctx.lineTo(x, MARGIN.top + this.height + 4);
      ctx.stroke();
      if (x - half < free || x + half > MARGIN.left + this.width + MARGIN.right) continue;
      ctx.fillText(label, x, MARGIN.top + this.height + 6);
      free = x + half + 8;
    }
    ctx.beginPath();
    ctx.moveTo(MARGIN.left, MARGIN.top + this.height + 0.5);
    ctx.lineTo(MARGIN.left + this.width, MARGIN.top + this.height + 0.5);
    ctx.stroke();
    ctx.fillText(axis.label, MARGIN.left + this.width / 2, MARGIN.top + this.height + 21);
  }

  curve(ctx, { run, xs, raw, ys, low, high, start, end }) {
    ctx.strokeStyle = ctx.fillStyle = color(run);
    if (low.length) this.band(ctx, xs, low, high, start, end);
    ctx.lineJoin = "round";
    ctx.setLineDash(style(run)[1]);
    if (state.smooth && !low.length) {
      ctx.globalAlpha = 0.25;
      ctx.lineWidth = 1;
      this.path(ctx, xs, raw, start, end);
      ctx.globalAlpha = 1;
    }
    ctx.lineWidth = 1.8;
    this.path(ctx, xs, ys, start, end);
    ctx.setLineDash([]);
    if (end - start > this.width / 12) return;
    for (let i = start; i < end; i++) {
      if (state.logy && ys[i] <= 0 || state.logx && xs[i] <= 0) continue;
      ctx.beginPath();
      ctx.arc(this.toX(xs[i]), this.toY(ys[i]), 2.6, 0, 7);
      ctx.fill();
    }
  }

  band(ctx, xs, low, high, start, end) {
    const inside = [...Array(end - start).keys()].map((i) => i + start).filter((i) =>
      !(state.logy && low[i] <= 0 || state.logx && xs[i] <= 0));
    ctx.globalAlpha = 0.18;
    ctx.beginPath();
    for (const i of inside) ctx.lineTo(this.toX(xs[i]), this.toY(high[i]));
    for (const i of inside.reverse()) ctx.lineTo(this.toX(xs[i]), this.toY(low[i]));
    ctx.fill();
    ctx.globalAlpha = 1;
  }

  // Of the points in one column of pixels the first, the lowest, the highest and the last are enough.
  path(ctx, xs, ys, start, end) {
    let column = null, low = 0, high = 0, last = 0;
    const flush = () => {
      ctx.lineTo(column, low);
      ctx.lineTo(column, high);
      ctx.lineTo(column, last);
    };
    ctx.beginPath();
    for (let i = start; i < end; i++) {
      if (state.logy && ys[i] <= 0 || state.logx && xs[i] <= 0) continue;
      const x = Math.round(2 * this.toX(xs[i])) / 2, y = this.toY(ys[i]);
      if (x === column) {
        low = Math.max(low, y);
        high = Math.min(high, y);
      } else {
        if (column !== null) flush();
        ctx.lineTo(x, y);
        column = x;
        low = high = y;
      }
      last = y;
    }
    if (column !== null) flush();
    ctx.stroke();
  }

  listen() {
    let from = null;
    const at = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!this.toX || event.button !== 0) return;
      if (event.pointerType === "mouse") {
        from = at(event);
        this.canvas.setPointerCapture(event.pointerId);
      }
      moveCursor(this, this.fromX(at(event)));
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!this.toX) return;
      moveCursor(this, this.fromX(at(event)));
      if (from === null) return;
      const [left, right] = [from, at(event)].map((x) => this.toX(this.fromX(x))).sort((a, b) => a - b);
      this.chosen.hidden = right - left < 4;
      this.chosen.style.left = `${left}px`;
      this.chosen.style.width = `${right - left}px`;
    });
    this.canvas.addEventListener("pointerup", (event) => {
      if (from !== null && !this.chosen.hidden) zoomTo([from, at(event)].map(this.fromX).sort((a, b) => a - b));
      from = null;
      this.chosen.hidden = true;
    });
    this.canvas.addEventListener("pointercancel", () => { from = null; this.chosen.hidden = true; });
    this.canvas.addEventListener("pointerleave", () => { if (document.activeElement !== this.canvas) moveCursor(null, null); });
    this.canvas.addEventListener("blur", () => moveCursor(null, null));
    this.canvas.addEventListener("dblclick", () => zoomTo(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (!this.toX || !this.xs || event.ctrlKey || event.metaKey || event.altKey) return;
    const [left, right] = this.xs, now = state.cursor === null ? left : state.cursor;
    const move = { ArrowLeft: -0.01, ArrowRight: 0.01, ArrowDown: -0.01, ArrowUp: 0.01, PageDown: -0.1, PageUp: 0.1 }[event.key];
    if (move !== undefined) moveCursor(this, this.fromX(this.toX(now) + Math.sign(move) * Math.max(1, Math.abs(move) * this.width)));
    else if (event.key === "Home" || event.key === "End") moveCursor(this, event.key === "Home" ? left : right);
    else if (event.key === "+" || event.key === "=") zoomBy(0.5);
    else if (event.key === "-") zoomBy(2);
    else if (event.key === "0" || event.key === "Escape") zoomTo(null);
    else return;
    event.preventDefault();
  }

  // Shows the values of all runs at x, each the one that is next to it.
  read(x) {
    const axis = xAxis(this.xs[1]);
    const found = this.seen.map(({ run, xs, ys }) => {
      const i = nearest(xs, x);
      return { run, x: xs[i], y: ys[i] };
    });
    const closest = found.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a);
    const title = `${axis.label.split(" (p")[0]} ${number(closest.x / axis.scale)}`;
    const lines = found.map(({ run, y }) => element("div", {},
      swatch(run), element("span", { className: "name" }, run.name), element("span", {}, number(y, 5))));
    this.tip.replaceChildren(element("div", {}, title), ...lines);
    const pixel = this.toX(x), right = pixel < MARGIN.left + this.width / 2;
    this.tip.style.left = right ? `${pixel + 12}px` : "";
    this.tip.style.right = right ? "" : `${this.plot.clientWidth - pixel + 12}px`;
    this.canvas.setAttribute("aria-valuenow", x);
    this.canvas.setAttribute("aria-valuetext", `${title}: ${found.map(({ run, y }) => `${run.name} ${number(y, 5)}`).join(", ")}`);
  }
}

function moveCursor(chart, x) {
  state.cursor = x;
  for (const one of charts.values()) {
    const there = x !== null && one.seen && one.seen.length && one.toX;
    one.cursor.hidden = !there;
    if (there) one.cursor.style.left = `${one.toX(x)}px`;
    one.tip.hidden = !there || one !== chart;
    if (!one.tip.hidden) one.read(x);
  }
}

function zoomTo(range) {
  const whole = wholeRange();
  if (range && whole) {
    range = [Math.max(range[0], whole[0]), Math.min(range[1], whole[1])];
    if (!(range[1] - range[0] > 1e-6 * (whole[1] - whole[0]))) return;
    if (range[0] <= whole[0] && range[1] >= whole[1]) range = null;
  }
  state.zoom = range;
  drawCharts();
}

function zoomBy(factor) {
  const now = xRange();
  if (!now) return;
  const [low, high] = state.logx ? now.map(Math.log) : now;
  const at = state.cursor === null ? (low + high) / 2 : state.logx ? Math.log(state.cursor) : state.cursor;
  const range = [at - (at - low) * factor, at + (high - at) * factor];
  zoomTo(state.logx ? range.map(Math.exp) : range);
}

let waiting = [];

function drawWaiting() {
  if (!waiting.length) return;
  waiting.shift().draw();
  setTimeout(drawWaiting);
}

// Draws what is on the screen now, and the rest after it.
function drawCharts() {
  const idle = !waiting.length;
  waiting = [];
  for (const one of [...charts.values(), ...heatmaps.values()]) {
    const box = one.node.getBoundingClientRect();
    if (box.bottom > 0 && box.top < innerHeight) one.draw(); else waiting.push(one);
  }
  if (idle) setTimeout(drawWaiting);
  const focused = [...charts.values()].find((chart) => chart.canvas === document.activeElement);
  if (focused && state.cursor !== null && xRange()) {
    moveCursor(focused, Math.min(Math.max(state.cursor, xRange()[0]), xRange()[1]));
  }
}

// ---- metrics that are lists, such as the load of experts, over the steps

class Heatmap {
  constructor(metric) {
    this.metric = metric;
    this.select = element("select", { "aria-label": "run" });
    this.select.addEventListener("change", () => this.draw());
    this.canvas = element("canvas", { role: "img" });
    this.about = element("span", { className: "quiet" });
    this.plot = element("div", { className: "plot" }, this.canvas);
    this.node = element("figure", {}, element("figcaption", {}, metric, this.select, this.about), this.plot);
    this.canvas.addEventListener("pointermove", (event) => this.read(event));
  }

  update() {
    const names = data.runs.filter((run) => run.lists[this.metric]).map((run) => [run.path, run.name]);
    const before = this.select.value;
    if (JSON.stringify(names) !== this.names) {
      this.select.replaceChildren(...names.map(([value, text]) => element("option", { value }, text)));
      if (names.some(([path]) => path === before)) this.select.value = before;
      this.names = JSON.stringify(names);
    }
  }

  draw() {
    const run = data.runs.find((one) => one.path === this.select.value);
    const box = this.plot.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    if (!run || !box.width) return;
    const flat = (value, name) => Array.isArray(value) ? value.flatMap((part, i) => flat(part, name === "" ? `${i}` : `${name}.${i}`)) : [[name, value]];
    this.steps = [];
    this.lines = [];
    run.lists[this.metric].forEach((value, i) => {
      if (Array.isArray(value)) { this.steps.push(run.steps[i]); this.lines.push(flat(value, "")); }
    });
    const values = this.lines.flat().map(([, value]) => value).filter((value) => value !== null);
    const rows = Math.max(...this.lines.map((line) => line.length)), columns = this.lines.length;
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    const ctx = this.canvas.getContext("2d"), css = getComputedStyle(document.documentElement);
    ctx.scale(ratio, ratio);
    this.width = box.width - MARGIN.left - MARGIN.right;
    this.height = box.height - MARGIN.top - MARGIN.bottom;
    const wide = this.width / columns, high1 = this.height / rows;
    ctx.fillStyle = css.getPropertyValue("--accent");
    this.lines.forEach((line, i) => line.forEach(([, value], row) => {
      if (value === null) return;
      ctx.globalAlpha = high > low ? 0.04 + 0.96 * (value - low) / (high - low) : 0.5;
      ctx.fillRect(MARGIN.left + i * wide, MARGIN.top + row * high1, wide + 0.3, Math.max(1, high1 - (high1 > 6 ? 1 : 0)));
    }));
    ctx.globalAlpha = 1;
    ctx.fillStyle = css.getPropertyValue("--quiet");
    ctx.font = "12px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    const every = Math.ceil(rows / Math.floor(this.height / 14));
    (this.lines[0] || []).forEach(([name], row) => {
      if (row % every === 0) ctx.fillText(name, MARGIN.left - 6, MARGIN.top + (row + 0.5) * high1);
    });
    ctx.textBaseline = "top";
    ctx.textAlign = "center";
    const count = Math.max(1, Math.floor(this.width / 90));
    for (let i = 0; i < columns; i += Math.max(1, Math.ceil(columns / count))) {
      ctx.fillText(number(this.steps[i]), MARGIN.left + (i + 0.5) * wide, MARGIN.top + this.height + 5);
    }
    ctx.fillText("step", MARGIN.left + this.width / 2, MARGIN.top + this.height + 20);
    this.range = `from ${number(low, 3)} (pale) to ${number(high, 3)} (full)`;
    this.about.textContent = this.range;
    this.canvas.setAttribute("aria-label", `${this.metric} of ${run.name} at ${columns} steps, ${rows} values each, ${this.range}`);
  }

  read(event) {
    const box = this.plot.getBoundingClientRect(), line = (part, count) => Math.floor(part * count);
    const i = line((event.clientX - box.left - MARGIN.left) / this.width, this.lines.length);
    const found = this.lines[i], row = found && line((event.clientY - box.top - MARGIN.top) / this.height, found.length);
    const cell = found && found[row];
    this.about.textContent = cell ? `step ${number(this.steps[i])}, ${cell[0]}: ${number(cell[1])}` : this.range;
  }
}

// ---- tables and texts

function scrolled(label, table) {
  return element("div", { className: "scroll", role: "region", "aria-label": label }, table);
}

function table(label, header, rows, { swatches = [], texts = [] } = {}) {
  const head = element("thead", {}, element("tr", {}, ...header.map((cell, i) => element("th", { scope: "col", className: texts.includes(i) ? "text" : "" }, cell))));
  const body = rows.map(([first, ...cells], i) => element("tr", {},
    element("th", { scope: "row", title: first }, swatches[i] ? swatch(swatches[i]) : null, first),
    ...cells.map((cell, j) => element("td", texts.includes(j + 1) ? { className: "text" } : {}, cell))));
  return scrolled(label, element("table", {}, head, element("tbody", {}, ...body)));
}

function columnTable(label, columns, options) {
  const cells = Object.values(columns);
  return table(label, Object.keys(columns), cells[0].map((_, i) => cells.map((column) => column[i])), options);
}

function details(key, title, ...children) {
  const node = element("details", {}, element("summary", {}, title), ...children);
  node.dataset.key = key;
  return node;
}

const rendered = new Map();

// Builds a section again where its data has changed; what is open, scrolled and focused stays so.
function section(id, value, build) {
  const text = JSON.stringify(value);
  if (rendered.get(id) === text) return;
  const node = find(id), inside = "button, input, select, summary, .scroll";
  const opened = new Map([...node.querySelectorAll("details")].map((one) => [one.dataset.key, one.open]));
  const scrolls = [...node.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
  const focused = [...node.querySelectorAll(inside)].indexOf(document.activeElement);
  rendered.set(id, text);
  node.replaceChildren(...build());
  for (const one of node.querySelectorAll("details")) if (opened.has(one.dataset.key)) one.open = opened.get(one.dataset.key);
  node.querySelectorAll(".scroll").forEach((one, i) => { one.scrollLeft = scrolls[i] || 0; });
  const again = node.querySelectorAll(inside)[focused];
  if (again) again.focus({ preventScroll: true });
}

const heading = (text) => element("h2", {}, text);

function renderRuns() {
  const { columns, about, settings, averages, runs } = data;
  if (!runs.length) return [];
  const parts = [heading("Runs"), columnTable("Runs", columns, { swatches: runs }), element("p", { className: "quiet" }, about.join("; "))];
  if (Object.keys(averages).length) parts.push(element("h3", {}, "Seeds averaged"), columnTable("Seeds averaged", averages));
  const keys = Object.entries(settings);
  if (keys.length) {
    parts.push(element("h3", {}, "Keys that differ"));
    parts.push(table("Keys that differ", ["key", ...runs.map((run) => run.name)], keys.map(([key, cells]) => [key, ...cells])));
  } else if (runs.length > 1) parts.push(element("p", { className: "quiet" }, "Their configs do not differ."));
  return parts;
}

function renderSweeps() {
  return data.sweeps.flatMap((sweep) => [
    heading(`Sweep: ${sweep.name}`),
    element("p", {}, `${sweep.state}; the baseline is ${sweep.baseline}.`),
    ...(Object.keys(sweep.table).length ? [columnTable(`Sweep ${sweep.name}`, sweep.table)] : []),
    ...sweep.lines.map((line) => element("p", { className: "quiet" }, line)),
    element("div", { className: "plots" }, ...sweep.plots.map((src) => element("img", { src, alt: `Plots of the sweep ${sweep.name}` }))),
  ]);
}

function renderEvaluations() {
  if (!Object.keys(data.evaluations).length) return [];
  return [heading("Evaluations"), columnTable("Evaluations", data.evaluations, { texts: [1] }),
    element("p", { className: "quiet" }, "@: its step; ±: standard error")];
}

function renderSamples(found) {
  if (!found.length) return [];
  return [heading("Samples"), ...found.map(({ path, run, samples }, i) => {
    const named = (step) => step === null ? "at the end" : `step ${step.toLocaleString("en")}`;
    const texts = samples.map(({ step, text }, j) => {
      const one = details(`${path}/${step}`, named(step), element("pre", {}, text));
      one.open = j === samples.length - 1;
      return one;
    });
    const node = details(path, run, ...texts);
    node.open = i === 0 || found.length < 4;
    return node;
  })];
}

function renderHistories(found) {
  const rows = found.flatMap(({ run, history, starts }) => [
    ...starts.map(({ step, date, devices, device, processes, versions }) => [run, step, date, step ? "continued" : "begun",
      `${devices} x ${device}` + (processes > 1 ? ` of ${processes} processes` : "") + Object.entries(versions || {}).map((one) => `, ${one.join(" ")}`).join("")]),
    ...history.map(({ step, date, changes }) => [run, step, date, "changed",
      Object.entries(changes).map(([key, [old, now]]) => `${key}: ${JSON.stringify(old)} → ${JSON.stringify(now)}`).join("\n")]),
  ].sort((a, b) => `${a[2]}`.localeCompare(`${b[2]}`)).map(([name, step, date, ...rest]) => [name, number(step), `${date}`, ...rest]));
  if (!rows.length) return [];
  return [heading("Starts and changes"), table("Starts and changes", ["run", "step", "date", "what", ""], rows, { texts: [4] })];
}

function renderConfigs(found) {
  return found.length ? [heading("Configs"), ...found.map(({ path, run, place, config }) =>
    details(path, run, element("p", { className: "quiet" }, place), table(`Config of ${run}`, ["key", "value"], Object.entries(config), { texts: [1] })))] : [];
}

function renderLegend() {
  const boxes = data.runs.map((run) => {
    const box = element("input", { type: "checkbox", checked: !state.hidden.has(run.path) });
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(run.path); else state.hidden.add(run.path);
      drawCharts();
    });
    return element("label", {}, box, swatch(run), run.name);
  });
  const all = (text, checked) => {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      state.hidden = new Set(checked ? [] : data.runs.map((run) => run.path));
      for (const box of find("legend").querySelectorAll("input")) box.checked = checked;
      drawCharts();
    });
    return button;
  };
  return [element("legend", {}, "Runs"), ...boxes, ...(boxes.length > 1 ? [element("span", { className: "buttons" }, all("all", true), all("none", false))] : [])];
}

// ---- the whole page

function update() {
  for (const run of data.runs) {
    if (!groups.has(run.group)) groups.set(run.group, []);
    if (!groups.get(run.group).includes(run.path)) groups.get(run.group).push(run.path);
  }
  find("seeds").hidden = !Object.keys(data.averages).length;
  document.title = find("title").textContent = data.title;
  find("about").textContent = `${data.runs.length} run${data.runs.length === 1 ? "" : "s"}, ${data.date}, llama_jax ${data.version}`;
  section("notes", data.notes, () => data.notes.map((note) => element("li", {}, note)));
  section("sweeps", data.sweeps, renderSweeps);
  section("runs", [data.columns, data.about, data.settings, data.averages, data.runs.map((run) => run.name)], renderRuns);
  section("legend", data.runs.map((run) => [run.path, run.name]), renderLegend);
  const parts = (name) => data.runs.map((run) => ({ path: run.path, run: run.name, ...Object.fromEntries(name.map((one) => [one, run[one]])) }));
  section("evaluations", data.evaluations, renderEvaluations);
  const samples = parts(["samples"]).filter((one) => one.samples.length);
  section("samples", samples, () => renderSamples(samples));
  const histories = parts(["history", "starts"]);
  section("histories", histories, () => renderHistories(histories));
  const configs = data.runs.map((run) => ({ path: run.path, run: run.name, place: run.path, config: run.config }));
  section("configs", configs, () => renderConfigs(configs));
  updateCharts();
  markScrolled();
}

function updateCharts() {
  const metrics = new Set(data.runs.flatMap((run) => Object.keys(run.metrics)));
  const rank = (metric) => FIRST.includes(metric) ? FIRST.indexOf(metric) : FIRST.length;
  const ordered = [...metrics].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  find("curves").hidden = !data.runs.length;
  for (const metric of ordered) if (!charts.has(metric)) charts.set(metric, new Chart(metric));
  const nodes = ordered.map((metric) => charts.get(metric).node);
  if (nodes.some((node, i) => find("charts").children[i] !== node)) find("charts").replaceChildren(...nodes);
  if (!nodes.length) find("charts").replaceChildren(element("p", {}, "Nothing has been logged yet."));
  for (const metric of new Set(data.runs.flatMap((run) => Object.keys(run.lists)))) {
    if (!heatmaps.has(metric)) {
      if (!heatmaps.size) find("heatmaps").append(heading("Lists over time"), element("div", { className: "charts" }));
      heatmaps.set(metric, new Heatmap(metric));
      find("heatmaps").lastChild.append(heatmaps.get(metric).node);
    }
  }
  for (const heatmap of heatmaps.values()) heatmap.update();
  drawCharts();
}

// Only what can be scrolled takes part in the order of Tab.
function markScrolled() {
  for (const node of document.querySelectorAll(".scroll")) {
    if (node.scrollWidth > node.clientWidth + 1) node.tabIndex = 0; else node.removeAttribute("tabindex");
  }
}

function controls() {
  let frame = 0;
  find("x").addEventListener("change", (event) => { state.x = event.target.value; zoomTo(null); });
  for (const name of ["logx", "logy", "whole", "mean"]) {
    find(name).addEventListener("change", (event) => { state[name] = event.target.checked; if (name === "logx") zoomTo(null); else drawCharts(); });
  }
  find("smooth").addEventListener("input", (event) => {
    state.smooth = +event.target.value;
    find("smoothed").textContent = event.target.value;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(drawCharts);
  });
  find("in").addEventListener("click", () => zoomBy(0.5));
  find("out").addEventListener("click", () => zoomBy(2));
  find("reset").addEventListener("click", () => zoomTo(null));
  let width = 0;
  new ResizeObserver(() => {
    if (find("charts").clientWidth === width) return;
    width = find("charts").clientWidth;
    requestAnimationFrame(() => { drawCharts(); markScrolled(); });
  }).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
}

let version = null;

async function poll() {
  const status = find("status");
  try {
    const answer = await fetch("data", { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
    if (answer.status !== 304) {
      const found = await answer.json();
      if (found.error) throw new Error(found.error);
      version = answer.headers.get("ETag");
      data = found;
      update();
    }
    status.textContent = `live, last change ${data.date.slice(11, 19)}`;
    status.className = "";
  } catch (error) {
    status.textContent = error instanceof TypeError ? "not live: the server does not answer" : `not live: ${error.message}`;
    status.className = "failed";
  }
  status.hidden = false;
  setTimeout(poll, POLL);
}

controls();
update();
if (WATCHED) setTimeout(poll, POLL);
