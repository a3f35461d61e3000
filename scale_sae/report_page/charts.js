"use strict";
// What the page draws on canvases: line charts with a shared crosshair, sparklines, histograms; and how numbers look.

const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  // Text goes in as text: names come from configs.
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};

// Numbers that JSON cannot hold are strings.
const toNumber = (value) => (typeof value === "string" ? Number(value.replace("inf", "Infinity")) : value);
const isFinite_ = (value) => typeof value === "number" && Number.isFinite(value);

function format(value) {
  if (value === null || value === undefined) return "–";
  const v = toNumber(value);
  if (Number.isNaN(v)) return "NaN";
  if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  if (v === 0) return "0";
  if (Number.isInteger(v) && size < 1e6) return v.toLocaleString("en-US").replace("-", "−");
  if (size >= 1e6) return short(v);
  const digits = digitsOf(size);
  if (digits < 0) return v.toExponential(2).replace("-", "−").replace("e-", "e−");
  return v.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
}
const digitsOf = (size) => (size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.01 ? 3 : -1);

// Numbers that stand in one column, with as many decimals each.
function formatAlike(values) {
  const sizes = values.filter(isFinite_).map(Math.abs).filter((v) => v > 0).sort((a, b) => a - b);
  const digits = sizes.length ? digitsOf(sizes[sizes.length >> 1]) : 0;
  if (digits < 0 || sizes.every(Number.isInteger) || sizes.at(-1) >= 1e6) return format;
  const style = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return (value) => (isFinite_(value) ? value.toLocaleString("en-US", style).replace("-", "−") : format(value));
}

// A long name without its middle: what tells names apart is mostly at their ends.
const abbreviate = (name, room = 42) => (name.length > room ? `${name.slice(0, Math.floor(room * 0.35))}…${name.slice(1 - Math.ceil(room * 0.65))}` : name);

// 1234567 -> 1.23M
function short(v) {
  const size = Math.abs(v);
  const [divisor, unit] = size >= 1e12 ? [1e12, "T"] : size >= 1e9 ? [1e9, "B"] : size >= 1e6 ? [1e6, "M"] : size >= 1e3 ? [1e3, "k"] : [1, ""];
  return String(parseFloat((v / divisor).toPrecision(3))).replace("-", "−") + unit;
}

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${seconds < 10 ? seconds.toFixed(1) : s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

const probe = el("span", { hidden: "" });
document.body.append(probe);
// A colour of the style sheet as it is now, light or dark.
function themed(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

function surface(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  return { pen, width, height };
}

function niceTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999) || raw;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  const decades = Math.log10(high / low);
  const every = Math.max(1, Math.ceil(decades / 5));
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of decades < 2 ? [1, 2, 5] : decades < 3 ? [1, 3] : [1]) {
      const t = m * 10 ** e;
      if (t >= low && t <= high && e % every === 0) ticks.push(t);
    }
  }
  return ticks.length > 1 ? ticks : niceTicks(low, high, 4);
}

function tickLabel(v, span) {
  const size = Math.abs(v);
  if (size >= 1000) return short(v);
  if (v === 0) return "0";
  if (size < 1e-3) return v.toExponential(0).replace("e-", "e−").replace(/^-/, "−");
  const digits = Math.max(0, Math.min(6, Math.ceil(-Math.log10(Math.abs(span) || 1)) + 1));
  return String(parseFloat(v.toFixed(digits + 1))).replace("-", "−");
}

// Above so many lines, each is faint, and the median of those of one colour stands out.
const MANY_LINES = 30;
const middle = (values) => { const v = values.filter(isFinite_).sort((a, b) => a - b); return v.length ? (v[(v.length - 1) >> 1] + v[v.length >> 1]) / 2 : null; };
function medians(lines) {
  const byColor = Map.groupBy(lines, (line) => line.color);
  return [...byColor].map(([color, members]) => {
    const at = new Map();
    for (const line of members) line.y.forEach((value, i) => { if (isFinite_(value)) at.has(line.x[i]) ? at.get(line.x[i]).push(value) : at.set(line.x[i], [value]); });
    const x = [...at.keys()].sort((a, b) => a - b);
    return { color, x, y: x.map((place) => middle(at.get(place))), isMedian: true };
  });
}

// Lines over a shared x. `lines()` gives [{id, label, color, x: [..], y: [..]}]; y may hold nulls: gaps.
class LineChart {
  constructor(canvas, { lines, log = false, page, unit = "" }) {
    Object.assign(this, { canvas, lines, log, page, unit });
    canvas.addEventListener("pointermove", (event) => page.hover(this, event));
    canvas.addEventListener("pointerdown", (event) => page.hover(this, event));
    canvas.addEventListener("pointerleave", () => page.leave());
  }

  draw() {
    const { pen, width, height } = surface(this.canvas);
    if (!width) return;
    const shown = (this.shown = this.lines());
    const points = [];
    let [xLow, xHigh] = [Infinity, -Infinity];
    for (const line of shown) {
      line.y.forEach((value, i) => {
        if (isFinite_(value) && (!this.log || value > 0)) {
          points.push(value);
          if (line.x[i] < xLow) xLow = line.x[i];
          if (line.x[i] > xHigh) xHigh = line.x[i];
        }
      });
    }
    if (!points.length) {
      pen.fillStyle = themed("faint");
      pen.textAlign = "center";
      pen.fillText("nothing to show", width / 2, height / 2);
      this.map = null;
      return;
    }
    let low = Infinity, high = -Infinity;
    for (const v of points) { if (v < low) low = v; if (v > high) high = v; }
    // A few wild values (a first step) must not flatten the rest: the axis ends at what 98 % of the values are within.
    this.cut = false;
    if (!this.log && points.length > 40) {
      points.sort((a, b) => a - b);
      const at = (share) => points[Math.round(share * (points.length - 1))];
      const [p1, p99] = [at(0.01), at(0.99)];
      const room = 1.5 * (p99 - p1);
      if (p99 > p1 && low < p1 - room) { low = p1 - 0.1 * (p99 - p1); this.cut = true; }
      if (p99 > p1 && high > p99 + room) { high = p99 + 0.1 * (p99 - p1); this.cut = true; }
    }
    if (low === high) {
      const pad = Math.abs(low) * 0.05 || 1;
      low = this.log ? low / 1.5 : low - (low === 0 ? 0 : pad);
      high = this.log ? high * 1.5 : high + pad;
    } else if (this.log) { const f = (high / low) ** 0.04; low /= f; high *= f; }
    else { const pad = (high - low) * 0.05; low = low >= 0 && low < pad * 3 ? 0 : low - pad; high += pad; }
    if (xLow === xHigh) xHigh = xLow + 1;
    const ticks = this.log ? logTicks(low, high) : niceTicks(low, high, height / 52);
    const labels = ticks.map((t) => tickLabel(t, this.log ? t : (ticks[1] || t) - ticks[0]));
    const left = Math.max(30, Math.max(...labels.map((l) => pen.measureText(l).width)) + 10);
    const [top, right, bottom] = [8, width - 8, height - 24];
    const Y = this.log
      ? (v) => bottom - ((Math.log(v) - Math.log(low)) / (Math.log(high) - Math.log(low))) * (bottom - top)
      : (v) => bottom - ((v - low) / (high - low)) * (bottom - top);
    const X = (v) => left + ((v - xLow) / (xHigh - xLow)) * (right - left);
    this.map = { X, Y, left, right, top, bottom, xLow, xHigh };
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const [grid, faint] = [themed("grid"), themed("faint")];
    ticks.forEach((t, i) => {
      pen.strokeStyle = grid;
      pen.beginPath();
      pen.moveTo(left, Math.round(Y(t)) + 0.5);
      pen.lineTo(right, Math.round(Y(t)) + 0.5);
      pen.stroke();
      pen.fillStyle = faint;
      pen.fillText(labels[i], left - 7, Y(t));
    });
    pen.textBaseline = "alphabetic";
    niceTicks(xLow, xHigh, Math.max(2, (right - left) / 90)).forEach((t) => {
      pen.textAlign = X(t) > right - 14 ? "right" : X(t) < left + 14 ? "left" : "center";
      pen.fillText(short(t), X(t), height - 6);
    });
    pen.save();
    pen.beginPath();
    pen.rect(left - 3, top - 3, right - left + 6, bottom - top + 6);
    pen.clip();
    const focus = this.page.focus;
    const many = shown.length > MANY_LINES;
    const drawn = [...shown].sort((a, b) => (a.id === focus) - (b.id === focus));
    for (const line of many && !focus ? [...drawn, ...medians(drawn)] : drawn) {
      pen.strokeStyle = pen.fillStyle = line.color;
      pen.globalAlpha = line.isMedian || line.id === focus ? 1 : focus ? 0.17 : many ? 0.28 : 1;
      pen.lineWidth = line.isMedian || line.id === focus ? 2.6 : many ? 1 : 1.8;
      pen.lineJoin = "round";
      pen.beginPath();
      let last = null, count = 0;
      line.y.forEach((value, i) => {
        if (!isFinite_(value) || (this.log && value <= 0)) { if (value !== null) last = null; return; }
        last === null ? pen.moveTo(X(line.x[i]), Y(value)) : pen.lineTo(X(line.x[i]), Y(value));
        last = i;
        count++;
      });
      pen.stroke();
      if (count < 8 && !line.isMedian) {
        line.y.forEach((value, i) => {
          if (!isFinite_(value)) return;
          pen.beginPath();
          pen.arc(X(line.x[i]), Y(value), 2.6, 0, 7);
          pen.fill();
        });
      }
    }
    pen.restore();
    this.mark();
  }

  // The crosshair at the page's token, and a dot on each line (on the nearest, where there are many).
  mark() {
    const at = this.page.at;
    if (at === null || !this.map || at < this.map.xLow || at > this.map.xHigh) return;
    const { X, Y, top, bottom } = this.map;
    const pen = this.canvas.getContext("2d");
    pen.strokeStyle = themed("faint");
    pen.lineWidth = 1;
    pen.setLineDash([3, 3]);
    pen.beginPath();
    pen.moveTo(X(at), top);
    pen.lineTo(X(at), bottom);
    pen.stroke();
    pen.setLineDash([]);
    for (const line of this.shown) {
      if (this.shown.length > 12 && line.id !== this.page.focus) continue;
      const i = nearestIndex(line, at);
      if (i === null || !isFinite_(line.y[i])) continue;
      const y = Y(line.y[i]);
      if (!(y >= top - 2 && y <= bottom + 2)) continue;
      pen.fillStyle = line.color;
      pen.strokeStyle = themed("card");
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.arc(X(line.x[i]), y, 3.6, 0, 7);
      pen.fill();
      pen.stroke();
    }
  }
}

// A point per SAE: x over a logarithmic axis, where it may have one. `points()` gives [{id, color, group, x, y}], and
// those of one group are joined in the order of x.
class Scatter {
  constructor(canvas, { points, page, describe }) {
    Object.assign(this, { canvas, points, page, describe });
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("pointerdown", (event) => this.hover(event));
    canvas.addEventListener("pointerleave", () => page.leave());
  }

  draw() {
    const { pen, width, height } = surface(this.canvas);
    const points = (this.shown = this.points().filter((p) => isFinite_(p.x) && isFinite_(p.y)));
    if (!width || !points.length) return;
    const range = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    let [xLow, xHigh] = range(points.map((p) => p.x));
    let [low, high] = range(points.map((p) => p.y));
    const log = xLow > 0;
    if (log) { const f = Math.max((xHigh / xLow) ** 0.06, 1.1); xLow /= f; xHigh *= f; } else { const pad = (xHigh - xLow) * 0.06 || 1; xLow -= pad; xHigh += pad; }
    const pad = (high - low) * 0.1 || Math.abs(high) * 0.05 || 1;
    low -= pad;
    high += pad;
    const xTicks = log ? logTicks(xLow, xHigh) : niceTicks(xLow, xHigh, 6);
    const yTicks = niceTicks(low, high, height / 52);
    const labels = yTicks.map((t) => tickLabel(t, (yTicks[1] || t) - yTicks[0]));
    const left = Math.max(30, Math.max(...labels.map((l) => pen.measureText(l).width)) + 10);
    const [top, right, bottom] = [8, width - 8, height - 24];
    const place = (v) => (log ? Math.log(v / xLow) / Math.log(xHigh / xLow) : (v - xLow) / (xHigh - xLow));
    const X = (this.X = (v) => left + place(v) * (right - left));
    const Y = (this.Y = (v) => bottom - ((v - low) / (high - low)) * (bottom - top));
    const [grid, faint] = [themed("grid"), themed("faint")];
    const rule = (x1, y1, x2, y2) => { pen.strokeStyle = grid; pen.beginPath(); pen.moveTo(x1, y1); pen.lineTo(x2, y2); pen.stroke(); };
    pen.fillStyle = faint;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    yTicks.forEach((t, i) => { rule(left, Math.round(Y(t)) + 0.5, right, Math.round(Y(t)) + 0.5); pen.fillText(labels[i], left - 7, Y(t)); });
    pen.textBaseline = "alphabetic";
    pen.textAlign = "center";
    xTicks.forEach((t) => { rule(Math.round(X(t)) + 0.5, top, Math.round(X(t)) + 0.5, bottom); pen.fillText(short(t), X(t), height - 6); });
    const focus = this.page.focus;
    for (const group of Map.groupBy(points, (p) => p.group).values()) {
      pen.strokeStyle = faint;
      pen.globalAlpha = 0.45;
      pen.beginPath();
      [...group].sort((a, b) => a.x - b.x).forEach((p, i) => (i ? pen.lineTo(X(p.x), Y(p.y)) : pen.moveTo(X(p.x), Y(p.y))));
      pen.stroke();
    }
    for (const p of [...points].sort((a, b) => (a.id === focus) - (b.id === focus))) {
      pen.globalAlpha = focus && p.id !== focus ? 0.25 : 1;
      pen.fillStyle = p.color;
      pen.strokeStyle = themed("card");
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.arc(X(p.x), Y(p.y), p.id === focus ? 7 : points.length > 60 ? 4 : 5, 0, 7);
      pen.fill();
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    const away = (p) => Math.hypot(this.X(p.x) - (event.clientX - box.left), this.Y(p.y) - (event.clientY - box.top));
    const near = (this.shown || []).reduce((a, b) => (a && away(a) <= away(b) ? a : b), null);
    if (!near || away(near) > 40) return this.page.leave();
    this.page.point(near.id, this.describe(near), event);
  }
}

// The index of the value nearest to x, among those that are there.
function nearestIndex(line, x) {
  let best = null;
  line.x.forEach((value, i) => {
    if (line.y[i] === null || line.y[i] === undefined) return;
    if (best === null || Math.abs(value - x) <= Math.abs(line.x[best] - x)) best = i;
  });
  return best;
}

function sparkline(canvas, values, color, log = false) {
  const { pen, width, height } = surface(canvas);
  let shown = values.filter((v) => isFinite_(v) && (!log || v > 0)).map((v) => (log ? Math.log(v) : v));
  if (shown.length < 2 || !width) return;
  const sorted = [...shown].sort((a, b) => a - b);
  const low = sorted[Math.floor(sorted.length * 0.02)];
  const high = sorted[Math.ceil((sorted.length - 1) * 0.98)];
  const Y = (v) => height - 3 - ((Math.min(Math.max(v, low), high) - low) / (high - low || 1)) * (height - 6);
  const X = (i) => (i / (shown.length - 1)) * width;
  pen.beginPath();
  shown.forEach((v, i) => (i ? pen.lineTo(X(i), Y(v)) : pen.moveTo(X(i), Y(v))));
  pen.strokeStyle = color;
  pen.lineWidth = 1.8;
  pen.lineJoin = "round";
  pen.stroke();
  pen.lineTo(width, height);
  pen.lineTo(0, height);
  const fill = pen.createLinearGradient(0, 0, 0, height);
  fill.addColorStop(0, color);
  fill.addColorStop(1, "transparent");
  pen.globalAlpha = 0.16;
  pen.fillStyle = fill;
  pen.fill();
}

// Latents by log10 of their density. The first bin is of those that never fired; it stands apart, to the left.
function drawDensity(canvas, counts, bins, color, highest) {
  const { pen, width, height } = surface(canvas);
  if (!width) return;
  const first = bins.findIndex((edge) => edge >= -7);
  const [bottom, left, dead] = [height - 20, 44, 26];
  // Where most latents are dead, their bar is cut, and the caption says how many they are.
  const scale = (count) => Math.min(1, count / highest) * (bottom - 8);
  const w = (width - left) / (counts.length - first);
  pen.fillStyle = themed("bad");
  pen.beginPath();
  pen.roundRect(2, bottom - scale(counts[0]), dead - 4, Math.max(scale(counts[0]), counts[0] ? 2 : 0), 2);
  pen.fill();
  // What is below the axis, if anything, is in its first bar.
  const bars = counts.slice(first);
  bars[0] += counts.slice(1, first).reduce((a, b) => a + b, 0);
  pen.fillStyle = color;
  bars.forEach((count, i) => {
    if (!count) return;
    const h = Math.max(scale(count), 1.5);
    pen.beginPath();
    pen.roundRect(left + i * w + 0.5, bottom - h, Math.max(1, w - 1), h, [2, 2, 0, 0]);
    pen.fill();
  });
  pen.strokeStyle = themed("line");
  pen.beginPath();
  pen.moveTo(0, bottom + 0.5);
  pen.lineTo(width, bottom + 0.5);
  pen.stroke();
  pen.fillStyle = themed("faint");
  pen.font = pen.font.replace("12px", "11px");
  pen.textAlign = "left";
  pen.fillText("never", 0, height - 6);
  for (const power of [-6, -4, -2, 0]) {
    const x = left + (bins.indexOf(power) - first) * w;
    pen.textAlign = power === 0 ? "right" : "center";
    pen.fillText(power === 0 ? "1" : "10⁻" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[-power], x, height - 6);
  }
}
