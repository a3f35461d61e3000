"use strict";
// The page itself: what stands where, what is shown of it, and what follows the pointer.

const data = JSON.parse(document.getElementById("data").textContent);
const config = data.config || {};
const saes = data.saes;
const many = saes.length > 1;
saes.forEach((sae, order) => {
  sae.order = order;
  for (const name of Object.keys(sae.values)) sae.values[name] = sae.values[name].map(toNumber);
});

// ---- metrics: how they are called, and which way is better ----------------------------------------------------------

const KNOWN = {
  "metrics/explained_variance": { title: "Explained variance", better: 1 },
  "metrics/l0": { title: "L0 · active latents per token", short: "L0", log: true },
  "losses/overall_loss": { title: "Loss", better: -1, log: true },
  "dead": { title: "Dead latents, %", short: "Dead, %", better: -1 },
  "sparsity/dead_features": { title: "Dead latents", better: -1 },
  "losses/mse_loss": { title: "Reconstruction loss (MSE)", short: "MSE", better: -1, log: true },
  "metrics/mean_log10_feature_sparsity": { title: "Mean log₁₀ feature density", short: "log₁₀ density" },
  "sparsity/below_1e-5": { title: "Latents with density below 1e-5", short: "Below 1e-5", better: -1 },
  "sparsity/below_1e-6": { title: "Latents with density below 1e-6", short: "Below 1e-6", better: -1 },
  "details/grad_norm": { title: "Gradient norm", log: true },
  "details/current_learning_rate": { title: "Learning rate" },
  "perf/tokens_per_second": { title: "Tokens per second", better: 1 },
  "model_performance_preservation/ce_loss_score": { title: "CE loss score", better: 1 },
  "model_performance_preservation/ce_loss_with_sae": { title: "CE loss with SAE", better: -1 },
  "model_performance_preservation/ce_loss_without_sae": { title: "CE loss without SAE" },
  "model_performance_preservation/ce_loss_with_ablation": { title: "CE loss with ablation" },
  "model_behavior_preservation/kl_div_score": { title: "KL divergence score", short: "KL score", better: 1 },
  "model_behavior_preservation/kl_div_with_sae": { title: "KL divergence with SAE", better: -1 },
  "reconstruction_quality/explained_variance": { title: "Explained variance, held out", short: "EV, held out", better: 1 },
  "reconstruction_quality/mse": { title: "MSE, held out", better: -1 },
  "reconstruction_quality/cossim": { title: "Cosine similarity", better: 1 },
  "sparsity/l0": { title: "L0, held out", log: true },
  "shrinkage/l2_ratio": { title: "L2 ratio" },
};
// What training logs; all else was measured on held-out text.
const TRAINING = ["losses", "metrics", "details", "stream", "perf", "plots", "dead"];
const SPARSITY = ["dead_features", "mean_tokens_since_fired", "mean_passes_since_fired", "below_1e-5", "below_1e-6"];
function isEvaluation(name) {
  const [first, ...rest] = name.split("/");
  return first === "sparsity" ? !SPARSITY.includes(rest.join("/")) : !TRAINING.includes(first);
}
const words = (name) => { const last = name.split("/").pop().replace(/_/g, " "); return last[0].toUpperCase() + last.slice(1); };
const about = (name) => ({ title: words(name), ...(KNOWN[name] || {}) });
const brief = (name) => about(name).short || about(name).title;

// Dead latents as a share: SAEs of several widths in one chart.
for (const sae of saes) {
  const dead = sae.values["sparsity/dead_features"];
  if (dead && sae.d_sae) {
    sae.values.dead = dead.map((v) => (isFinite_(v) ? (100 * v) / sae.d_sae : v));
    const last = toNumber(sae.last["sparsity/dead_features"]);
    sae.last.dead = isFinite_(last) ? (100 * last) / sae.d_sae : last;
  }
}
const metricNames = [...new Set(saes.flatMap((sae) => Object.keys(sae.values)))].filter((name) => saes.some((sae) => sae.values[name]?.some((v) => v !== null)));
const has = (name) => metricNames.includes(name);
const deadName = has("dead") ? "dead" : "sparsity/dead_features";

// ---- colours ---------------------------------------------------------------------------------------------------------

const DISTINCT = ["#4269d0", "#e8a013", "#ef5f4c", "#34a77f", "#a05fe8", "#3fa7d6", "#e572b6", "#8a6d4f", "#7d8797", "#6aa61f"];
const SCALE = [[74, 62, 199], [142, 58, 196], [205, 67, 151], [239, 105, 98], [243, 158, 60], [214, 196, 60]];
function along(share) {
  const at = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1);
  const i = Math.min(Math.floor(at), SCALE.length - 2);
  return `rgb(${SCALE[i].map((low, k) => Math.round(low + (SCALE[i + 1][k] - low) * (at - i))).join(",")})`;
}
const hookpoints = [...new Set(saes.map((sae) => sae.hookpoint))];
const names = [...new Set(saes.map((sae) => sae.name))];
const groupings = {
  SAE: (sae) => sae.id,
  hookpoint: (sae) => sae.hookpoint,
  name: (sae) => sae.name || "(unnamed)",
};
const useful = Object.keys(groupings).filter((g) => g === "SAE" ? saes.length <= 40 || (hookpoints.length < 2 && names.length < 2) : g === "hookpoint" ? hookpoints.length > 1 && names.length > 1 || saes.length > 40 : names.length > 1 && hookpoints.length > 1);
const view = {
  colorBy: saes.length <= 10 ? "SAE" : names.length > 1 && names.length <= 10 && hookpoints.length > 1 ? "name" : hookpoints.length > 1 ? "hookpoint" : "SAE",
  filter: "",
  off: new Set(),
  extra: new Set(),
  sort: null,
  descending: true,
  heat: null,
  window: null,
  allDensities: false,
};
function groups() {
  const of = groupings[view.colorBy];
  return [...new Set(saes.map(of))];
}
function colorize() {
  const all = groups();
  const distinct = all.length <= DISTINCT.length && view.colorBy !== "hookpoint";
  saes.forEach((sae) => {
    const i = all.indexOf(groupings[view.colorBy](sae));
    sae.color = distinct ? DISTINCT[i] : along(all.length > 1 ? i / (all.length - 1) : 0.2);
  });
}
const matches = (sae) => view.filter.toLowerCase().split(/\s+/).every((word) => `${sae.id} ${sae.architecture || ""}`.toLowerCase().includes(word));
const shown = () => saes.filter((sae) => matches(sae) && !view.off.has(groupings[view.colorBy](sae)));

// ---- charts, and what follows the pointer ----------------------------------------------------------------------------

const charts = [];
const page = { focus: null, at: null };
const tip = document.getElementById("tip");
page.hover = (chart, event) => {
  if (!chart.map) return;
  const box = chart.canvas.getBoundingClientRect();
  const { left, right, xLow, xHigh, Y } = chart.map;
  const share = (event.clientX - box.left - left) / (right - left);
  if (share < -0.02 || share > 1.02) return page.leave();
  const x = xLow + Math.min(Math.max(share, 0), 1) * (xHigh - xLow);
  const rows = chart.shown.map((line) => ({ line, i: nearestIndex(line, x) })).filter((row) => row.i !== null);
  if (!rows.length) return;
  const pointer = event.clientY - box.top;
  const away = (row) => { const v = row.line.y[row.i]; const y = isFinite_(v) ? Y(v) : NaN; return Number.isFinite(y) ? Math.abs(y - pointer) : Infinity; };
  const near = rows.reduce((a, b) => (away(b) < away(a) ? b : a));
  page.at = near.line.x[near.i];
  page.focus = rows.length > 1 && away(near) < 26 ? near.line.id : null;
  drawCharts();
  const value = (row) => { const v = row.line.y[row.i]; return isFinite_(v) ? v : -Infinity; };
  rows.sort((a, b) => value(b) - value(a));
  let listed = rows;
  if (rows.length > 12) {
    const place = Math.min(Math.max(rows.indexOf(near) - 5, 0), rows.length - 11);
    listed = rows.slice(place, place + 11);
  }
  tip.replaceChildren(
    el("b", {}, `${format(page.at)} tokens`), el("span", { class: "soft" }, rows.length > listed.length ? ` · ${listed.length} of ${rows.length} SAEs` : ""),
    el("table", {}, ...listed.map((row) => el("tr", { class: row === near && rows.length > 1 ? "near" : null },
      el("td", {}, el("i", { style: { background: row.line.color } })), el("td", {}, abbreviate(row.line.label)), el("td", {}, format(row.line.y[row.i]))))),
  );
  placeTip(event);
};
page.leave = () => {
  tip.hidden = true;
  if (page.at === null && page.focus === null) return;
  page.at = page.focus = null;
  drawCharts();
};
page.point = (id, description, event) => {
  page.focus = id;
  page.at = null;
  drawCharts();
  tip.replaceChildren(el("b", {}, id), el("table", {}, ...description.map(([name, value]) => el("tr", {}, el("td"), el("td", {}, name), el("td", {}, value)))));
  placeTip(event);
};
function placeTip(event) {
  tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = tip;
  const x = event.clientX + 18 + w > innerWidth ? event.clientX - w - 18 : event.clientX + 18;
  tip.style.left = `${Math.max(6, x)}px`;
  tip.style.top = `${Math.min(Math.max(6, event.clientY - h / 2), innerHeight - h - 6)}px`;
}
let pending = false;
function drawCharts() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    charts.forEach((chart) => chart.draw());
  });
}
const linesOf = (name) => () => shown().filter((sae) => sae.values[name]).map((sae) => ({ id: sae.id, label: sae.id, color: sae.color, x: sae.tokens, y: sae.values[name] }));
function chartCard(name, options = {}) {
  const { title, log: usual } = { ...about(name), ...options };
  const canvas = el("canvas", { role: "img", "aria-label": `${title} over tokens` });
  const chart = new LineChart(canvas, { lines: options.lines || linesOf(name), page });
  const values = saes.flatMap((sae) => (sae.values[name] || []).filter(isFinite_));
  const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  chart.log = Boolean(usual) && low > 0 && high / low > 5;
  const toggle = el("button", { title: "switch the axis", onclick: () => { chart.log = !chart.log; toggle.textContent = chart.log ? "log" : "linear"; drawCharts(); } }, chart.log ? "log" : "linear");
  charts.push(chart);
  return el("div", { class: "card chart" }, el("header", {}, el("h3", { title: name }, title), low > 0 ? toggle : null), canvas);
}

// ---- parts of the page -----------------------------------------------------------------------------------------------

const lastOf = (sae, name) => { const v = sae.last[name]; return v === undefined ? null : toNumber(v); };
const tokensDone = Math.max(...saes.map((sae) => sae.tokens.at(-1)));
const stepDone = Math.max(...saes.map((sae) => sae.steps.at(-1)));
const batch = config.train?.train_batch_size_tokens;
const stepsWanted = batch ? Math.floor(config.train.training_tokens / batch) : null;
const totalSeconds = Math.max(...saes.map((sae) => Object.values(sae.seconds).reduce((a, b) => a + b, 0)));
const plural = (n, one) => `${n.toLocaleString("en-US")} ${one}${n === 1 ? "" : "s"}`;

function header() {
  const done = stepsWanted !== null && stepDone >= stepsWanted;
  const lost = saes.filter((sae) => sae.steps.at(-1) < stepDone);
  const pill = done ? el("span", { class: "pill done" }, "finished") : stepsWanted === null ? null : el("span", { class: "pill going" }, `${((100 * stepDone) / stepsWanted).toFixed(1)} %`);
  const t = config.topology || {};
  const lm = t.lm?.cache ? `activations cached` : t.lm === "colocated" || t.lm?.colocated ? "LM colocated" : t.lm ? `LM tp ${t.lm.tp ?? 1} × dp ${t.lm.dp ?? 1}` : null;
  const sae = t.sae ? `SAE tp ${t.sae.tp ?? 1} × dp ${t.sae.dp ?? 1}${(t.sae.groups ?? 1) > 1 ? ` × ${t.sae.groups} groups` : ""}` : null;
  const facts = {
    model: config.model && `${config.model.name} · ${config.model.dtype ?? ""}`,
    dataset: config.data && [config.data.dataset, config.data.dataset_name].filter(Boolean).join(" · "),
    SAEs: `${saes.length}${hookpoints.length > 1 ? ` at ${plural(hookpoints.length, "hookpoint")}` : ""}`,
    width: [...new Set(saes.map((s) => s.d_sae).filter(Boolean))].slice(0, 4).map((d) => d.toLocaleString("en-US")).join(", ") || null,
    topology: [lm, sae].filter(Boolean).join(" · ") || null,
    seed: config.seed ?? null,
  };
  const bar = el("i", { style: { width: `${stepsWanted ? Math.min(100, (100 * stepDone) / stepsWanted) : 100}%` } });
  const theme = el("button", { class: "icon", title: "light or dark", onclick: () => {
    const root = document.documentElement.style;
    const dark = (root.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.colorScheme = dark ? "light" : "dark";
    theme.textContent = dark ? "dark" : "light";
    redraw();
  } }, matchMedia("(prefers-color-scheme: dark)").matches ? "light" : "dark");
  return el("header", {},
    el("div", { class: "row between" }, el("span", { class: "kicker" }, "scale_sae · training run"), theme),
    el("div", { class: "row" }, el("h1", {}, config.logging?.run_name || data.name), pill, lost.length ? el("span", { class: "pill warn" }, `${lost.length} diverged`) : null),
    el("dl", { class: "facts" }, ...Object.entries(facts).filter(([, v]) => v !== null && v !== undefined && v !== "").map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, String(v))))),
    el("div", { class: done ? "progress done" : "progress" }, bar),
    el("div", { class: "row between small soft" },
      el("span", {}, `step ${format(stepDone)}${stepsWanted ? ` of ${format(stepsWanted)}` : ""} · ${format(tokensDone)} tokens`),
      el("span", {}, `${totalSeconds ? `${duration(totalSeconds)} · ` : ""}last record ${data.lastRecord}`)),
    ...(lost.length ? [el("div", { class: "note" }, `Diverged, and trained no further: ${lost.slice(0, 8).map((s) => `${s.id} (step ${s.steps.at(-1)})`).join(", ")}${lost.length > 8 ? " …" : ""}`)] : []),
    ...data.notes.map((note) => el("div", { class: "note" }, note)),
  );
}

const sparks = [];
function headline() {
  const evaluated = Object.values(data.release);
  const alive = saes.filter((sae) => sae.steps.at(-1) === stepDone);
  const figures = [
    { name: "metrics/explained_variance", label: "Explained variance", color: "accent" },
    { name: "metrics/l0", label: "L0 · latents per token", color: "accent" },
    { name: deadName, label: "Dead latents", unit: deadName === "dead" ? "%" : "", color: "bad" },
    { name: "losses/overall_loss", label: "Loss", color: "accent", log: true },
    { name: "model_performance_preservation/ce_loss_score", label: "CE loss score", color: "good" },
    { name: "perf/tokens_per_second", label: "Tokens per second", color: "good", typical: true },
  ];
  return el("div", { class: "figures" }, ...figures.map(({ name, label, unit, color, log, typical }) => {
    const released = evaluated.some((f) => name in f);
    if (!has(name) && !released) return null;
    const finals = alive.map((sae) => (typical ? middle(sae.values[name] || []) : has(name) ? lastOf(sae, name) : toNumber(data.release[sae.id]?.[name] ?? null)));
    const good = finals.filter(isFinite_);
    const canvas = el("canvas", { "aria-hidden": "true" });
    const length = Math.max(...saes.map((sae) => sae.values[name]?.length || 0));
    const curve = Array.from({ length }, (_, i) => middle(alive.map((sae) => sae.values[name]?.[i])));
    sparks.push(() => sparkline(canvas, curve, themed(color), log));
    const [low, high] = [Math.min(...good), Math.max(...good)];
    const direction = about(name).better;
    const best = alive[finals.indexOf(direction > 0 ? high : low)];
    const sub = typical ? `median of ${plural(length, "record")}` : !many || !good.length ? `after ${short(tokensDone)} tokens`
      : low === high ? "the same in every SAE" : `${formatAlike(good)(low)} – ${formatAlike(good)(high)}`;
    const units = [unit, many && !typical && low !== high ? "median" : ""].filter(Boolean).join(" ");
    return el("div", { class: "card figure", title: direction && best && many && !typical ? `best: ${best.id}` : name },
      el("div", { class: "name" }, label),
      el("div", { class: "value" }, typical && middle(finals) >= 1000 ? short(middle(finals)) : formatAlike(good)(middle(finals)), units ? el("span", { class: "unit" }, units) : null),
      el("div", { class: "sub" }, sub), curve.length > 1 ? canvas : null);
  }));
}

const segments = (options, current, choose, labels = {}) => {
  const box = el("div", { class: "segments", role: "group" });
  const fill = (now) => box.replaceChildren(...options.map((o) => el("button", { "aria-pressed": String(o === now), onclick: () => { fill(o); choose(o); } }, labels[o] || o)));
  fill(current);
  return box;
};

const legend = el("div", { class: "legend" });
const count = el("span", { class: "soft small" });
function fillLegend() {
  const all = groups();
  legend.hidden = !many;
  legend.replaceChildren(...all.map((group) => {
    const members = saes.filter((sae) => groupings[view.colorBy](sae) === group);
    if (!members.some(matches)) return null;
    return el("button", {
      class: "chip", "aria-pressed": String(!view.off.has(group)), title: "click: hide or show · double click: this alone",
      onclick: () => { view.off.has(group) ? view.off.delete(group) : view.off.add(group); changed(); },
      ondblclick: () => { view.off = new Set(all.filter((g) => g !== group)); changed(); },
      onpointerenter: () => { if (members.length === 1) { page.focus = members[0].id; drawCharts(); } },
      onpointerleave: () => { page.focus = null; drawCharts(); },
    }, el("i", { style: { background: members[0].color } }), el("span", { title: group }, abbreviate(group)));
  }).filter(Boolean));
  count.textContent = shown().length === saes.length ? plural(saes.length, "SAE") : `${shown().length} of ${saes.length} SAEs`;
}
function toolbar() {
  if (!many) return null;
  const search = el("input", { class: "search", type: "search", placeholder: "Find SAEs: layers.12, topk …", "aria-label": "find SAEs", oninput: () => { view.filter = search.value.trim(); changed(); } });
  const all = el("button", { class: "icon", onclick: () => { view.off.clear(); view.filter = search.value = ""; changed(); } }, "show all");
  const bar = el("div", { class: "toolbar" }, el("div", { class: "row" }, search,
    useful.length > 1 ? el("span", { class: "row" }, el("span", { class: "soft small" }, "colour by"), segments(useful, view.colorBy, (by) => { view.colorBy = by; view.off.clear(); colorize(); changed(); })) : null,
    all, count), legend);
  addEventListener("scroll", () => bar.classList.toggle("stuck", bar.getBoundingClientRect().top <= 0), { passive: true });
  return bar;
}

const section = (title, extra, ...children) => el("section", {}, el("div", { class: "row between section-head" }, el("h2", {}, title), extra), ...children);

// A section of charts: of the main metrics, and of the others that are asked for.
function curves(title, note, main, rest) {
  const grid = el("div", { class: "charts" }, ...main.map((name) => chartCard(name)));
  const chips = rest.map((name) => {
    let card = null, chart = null;
    const chip = el("button", { class: "chip", "aria-pressed": "false", title: name, onclick: () => {
      if (card) { card.remove(); charts.splice(charts.indexOf(chart), 1); card = null; }
      else { card = chartCard(name); chart = charts.at(-1); grid.append(card); }
      chip.setAttribute("aria-pressed", String(Boolean(card)));
      drawCharts();
    } }, el("i", { style: { background: "var(--accent)" } }), el("span", {}, brief(name)));
    return chip;
  });
  return section(title, el("span", { class: "soft small" }, note), grid,
    chips.length ? el("details", { class: "more" }, el("summary", {}, plural(chips.length, "more metric")), el("div", { class: "legend" }, ...chips)) : null);
}
function training() {
  const main = ["metrics/explained_variance", "metrics/l0", "losses/overall_loss", deadName].filter(has);
  const rest = metricNames.filter((name) => !main.includes(name) && !isEvaluation(name) && !name.startsWith("perf/") && !(name === "sparsity/dead_features" && has("dead")));
  return curves("Training", "over tokens", main, rest);
}
function evaluation() {
  const found = metricNames.filter(isEvaluation);
  if (!found.length) return null;
  const usual = ["model_performance_preservation/ce_loss_score", "model_behavior_preservation/kl_div_score", "reconstruction_quality/explained_variance", "model_performance_preservation/ce_loss_with_sae"].filter(has);
  const main = usual.length ? usual : found.slice(0, 4);
  return curves("Held-out evaluation", "the same contexts each time, SAEs as they would be released", main, found.filter((name) => !main.includes(name)));
}

// What more latents per token buy: one point per SAE.
function tradeOffs() {
  const score = "model_performance_preservation/ce_loss_score";
  const held = (name) => (sae) => { const v = data.release[sae.id]?.[name]; return v === undefined ? lastOf(sae, name) : toNumber(v); };
  const pairs = [
    ["metrics/explained_variance", (sae) => lastOf(sae, "metrics/l0"), (sae) => lastOf(sae, "metrics/explained_variance")],
    [score, held("sparsity/l0"), held(score)],
  ].filter(([, x, y]) => new Set(saes.filter((sae) => isFinite_(y(sae)) && isFinite_(x(sae))).map((sae) => x(sae).toPrecision(2))).size > 1);
  if (!pairs.length) return null;
  return section("Sparsity against fidelity", el("span", { class: "soft small" }, "one point per SAE; lines join those of one kind at a hookpoint"), el("div", { class: "charts" }, ...pairs.map(([name, x, y]) => {
    const canvas = el("canvas", { role: "img", "aria-label": `${about(name).title} over L0` });
    charts.push(new Scatter(canvas, {
      page,
      points: () => shown().map((sae) => ({ id: sae.id, color: sae.color, group: `${sae.hookpoint} ${sae.architecture}`, x: x(sae), y: y(sae) })),
      describe: (point) => [["L0", format(point.x)], [about(name).title, format(point.y)]],
    }));
    return el("div", { class: "card chart" }, el("header", {}, el("h3", {}, `${about(name).title} over L0`)), canvas);
  })));
}

// A colour for a value among values: stronger is better, or larger where neither is.
function shade(value, values, better) {
  const good = values.filter(isFinite_);
  const [low, high] = [Math.min(...good), Math.max(...good)];
  if (!isFinite_(value) || high === low) return null;
  const share = (value - low) / (high - low);
  const strength = better === -1 ? 1 - share : share;
  return `color-mix(in srgb, var(--${better ? "good" : "accent"}) ${(4 + 44 * strength).toFixed(1)}%, transparent)`;
}
const columns = () => {
  const training = ["metrics/explained_variance", "metrics/l0", deadName, "losses/overall_loss", "losses/mse_loss", "metrics/mean_log10_feature_sparsity"].filter(has).map((name) => ({ name, label: brief(name), value: (sae) => lastOf(sae, name), better: about(name).better }));
  const held = ["model_performance_preservation/ce_loss_score", "model_behavior_preservation/kl_div_score", "reconstruction_quality/explained_variance", "reconstruction_quality/cossim", "sparsity/l0", "model_performance_preservation/ce_loss_with_sae"];
  const released = new Set(Object.values(data.release).flatMap((f) => Object.keys(f)));
  const evaluated = held.filter((name) => has(name) || released.has(name)).map((name) => ({
    name, label: brief(name), better: about(name).better,
    // The release's figures, where it was evaluated; else those of the last evaluation in training.
    value: (sae) => { const v = data.release[sae.id]?.[name]; return v === undefined ? lastOf(sae, name) : toNumber(v); },
  }));
  return [...training, ...evaluated];
};
const tableBody = el("tbody");
const tableHead = el("tr");
function fillTable() {
  const all = columns();
  const texts = [{ name: "id", label: "SAE", value: (sae) => sae.order }, ...(saes.some((s) => s.architecture) ? [{ name: "architecture", label: "Architecture", value: (sae) => sae.architecture || "" }] : [])];
  const rows = shown();
  const column = [...texts, ...all].find((c) => c.name === view.sort);
  if (column) {
    const key = (sae) => { const v = column.value(sae); return v === null || Number.isNaN(v) ? null : v; };
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (view.descending ? -1 : 1);
    });
  }
  const numeric = all.map((c) => rows.map(c.value));
  const written = numeric.map(formatAlike);
  tableHead.replaceChildren(...[...texts, ...all].map((c) => el("th", {
    title: c.name, tabindex: "0", style: c.name === "architecture" ? { textAlign: "left" } : {}, "aria-sort": view.sort === c.name ? (view.descending ? "descending" : "ascending") : null,
    onclick: () => sortBy(c.name), onkeydown: (event) => { if (event.key === "Enter") sortBy(c.name); },
  }, c.label)));
  tableBody.replaceChildren(...rows.map((sae) => el("tr", {
    onpointerenter: (event) => { page.focus = sae.id; event.currentTarget.classList.add("focus"); drawCharts(); },
    onpointerleave: (event) => { page.focus = null; event.currentTarget.classList.remove("focus"); drawCharts(); },
  }, el("td", { title: sae.id }, el("i", { style: { background: sae.color } }), abbreviate(sae.id, 48)),
  ...texts.slice(1).map((c) => el("td", { class: "text" }, c.value(sae) || "–")),
  ...all.map((c, k) => { const v = c.value(sae); return el("td", { style: { background: shade(v, numeric[k], c.better) || "" }, title: v === null ? "" : String(v) }, written[k](v)); }))));
}
function sortBy(name) {
  view.descending = view.sort === name ? !view.descending : name !== "id" && name !== "architecture";
  view.sort = name;
  fillTable();
}

const heat = el("div", { class: "heat" });
function fillHeat() {
  const column = columns().find((c) => c.name === view.heat) || columns()[0];
  const rows = shown();
  const values = rows.map(column.value);
  const written = formatAlike(values);
  const at = new Map(rows.map((sae) => [`${sae.hookpoint}\n${sae.name}`, sae]));
  const [across, down] = [names.filter((n) => rows.some((s) => s.name === n)), hookpoints.filter((h) => rows.some((s) => s.hookpoint === h))];
  heat.style.gridTemplateColumns = `max-content repeat(${across.length}, minmax(64px, 1fr))`;
  heat.replaceChildren(el("span"), ...across.map((n) => el("div", { class: "head", title: n }, n || "SAE")),
    ...down.flatMap((h) => [el("div", { class: "side", title: h }, abbreviate(h)), ...across.map((n) => {
      const sae = at.get(`${h}\n${n}`);
      if (!sae) return el("div", { class: "cell empty" });
      const v = column.value(sae);
      return el("div", { class: "cell", title: `${sae.id}: ${v}`, style: { background: shade(v, values, column.better) || "var(--raised)" },
        onpointerenter: () => { page.focus = sae.id; drawCharts(); }, onpointerleave: () => { page.focus = null; drawCharts(); } }, written(v));
    })]));
}

function tables() {
  if (!many) return null;
  const table = el("div", { class: "card scroll" }, el("table", { class: "saes" }, el("thead", {}, tableHead), tableBody));
  const grid = hookpoints.length > 1 && names.length > 1;
  const labels = Object.fromEntries(columns().map((c) => [c.name, c.label]));
  return [
    section("SAEs", el("span", { class: "soft small" }, `at the last record${Object.keys(data.release).length ? ", held-out figures of the release" : ""} · click a heading to sort`), table),
    grid ? section("Hookpoints × SAEs", segments(columns().slice(0, 7).map((c) => c.name), columns()[0].name, (name) => { view.heat = name; fillHeat(); }, labels), el("div", { class: "card" }, heat)) : null,
  ];
}

// ---- feature densities -----------------------------------------------------------------------------------------------

const densityGrid = el("div", { class: "densities" });
const densityWhen = el("span", { class: "soft small" });
const DENSITIES_AT_ONCE = 24;
let densityDraws = [];
const histograms = (sae) => sae.densities.filter((d) => d.name.startsWith("plots/"));
const windows = [...new Set(saes.flatMap((sae) => histograms(sae).map((d) => d.tokens)))].sort((a, b) => a - b);
function fillDensities() {
  const tokens = windows[view.window];
  const rows = shown().filter((sae) => histograms(sae).length);
  const some = view.allDensities ? rows : rows.slice(0, DENSITIES_AT_ONCE);
  densityWhen.textContent = `window that ends at ${format(tokens)} tokens`;
  densityDraws = [];
  densityGrid.replaceChildren(...some.map((sae) => {
    const now = histograms(sae).findLast((d) => d.tokens <= tokens);
    if (!now) return null;
    const canvas = el("canvas", { role: "img", "aria-label": `feature density of ${sae.id}` });
    const highest = Math.max(1, ...histograms(sae).flatMap((d) => d.counts.slice(1)));
    densityDraws.push(() => drawDensity(canvas, now.counts, data.bins, sae.color, highest));
    const total = now.counts.reduce((a, b) => a + b, 0);
    const never = now.counts[0];
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const first = data.bins.findIndex((edge) => edge >= -7);
      const i = first + Math.floor(((event.clientX - box.left - 44) / (box.width - 44)) * (now.counts.length - first));
      const text = event.clientX - box.left < 40 ? `never fired: ${format(never)} latents` : i >= first && i < now.counts.length ? `${format(10 ** data.bins[i])} to ${format(10 ** data.bins[i + 1])} of tokens: ${format(now.counts[i])} latents` : null;
      if (!text) { tip.hidden = true; return; }
      tip.replaceChildren(el("b", {}, text));
      placeTip(event);
    });
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    return el("div", { class: "card density" }, el("h3", { title: sae.id }, abbreviate(sae.id, 34)),
      el("div", { class: "sub" }, `${format(total)} latents${never ? `, ${format(never)} never fired` : ""}`), canvas);
  }).filter(Boolean), ...(rows.length > some.length ? [el("button", { class: "icon", onclick: () => { view.allDensities = true; fillDensities(); } }, `${rows.length - some.length} more`)] : []));
  requestAnimationFrame(() => densityDraws.forEach((draw) => draw()));
}
function densities() {
  if (!windows.length) return null;
  view.window = windows.length - 1;
  const slider = el("input", { type: "range", min: 0, max: windows.length - 1, value: view.window, "aria-label": "sampling window", oninput: () => { view.window = Number(slider.value); fillDensities(); } });
  return section("Feature density", el("span", { class: "row" }, densityWhen, windows.length > 1 ? slider : null),
    densityGrid, el("p", { class: "soft small" }, "Latents by the share of tokens on which they fire (logarithmic); red: those that never fired in the window."));
}

// ---- where the time went ---------------------------------------------------------------------------------------------

const PARTS = {
  training: ["Training steps", DISTINCT[0]], activations: ["Activations", DISTINCT[1]], checkpoint: ["Checkpoints", DISTINCT[4]],
  evaluation: ["Evaluation", DISTINCT[3]], logging: ["Logging", DISTINCT[6]], other: ["Everything else", DISTINCT[8]],
};
function time() {
  const first = [...new Map(saes.filter((sae) => sae.values["perf/tokens_per_second"]).map((sae) => [JSON.stringify(sae.values["perf/tokens_per_second"]), sae])).values()];
  if (!first.length) return null;
  const groupLines = () => first.map((sae, i) => ({ id: `group ${i}`, label: first.length > 1 ? `group of ${sae.id}` : "tokens per second", color: DISTINCT[i % DISTINCT.length], x: sae.tokens, y: sae.values["perf/tokens_per_second"] }));
  const seconds = Object.entries(saes[0].seconds).filter(([, s]) => s > 0).sort((a, b) => b[1] - a[1]);
  const total = seconds.reduce((sum, [, s]) => sum + s, 0);
  const named = (part) => PARTS[part] || [part, DISTINCT[9]];
  return section("Throughput", el("span", { class: "soft small" }, "by the clock of the host"), el("div", { class: "time" },
    chartCard("perf/tokens_per_second", { title: "Tokens per second", lines: groupLines, log: false }),
    total ? el("div", { class: "card chart" }, el("header", {}, el("h3", {}, "Where the time went"), el("span", { class: "soft small" }, duration(total))),
      el("div", { class: "stack" }, ...seconds.map(([part, s]) => el("i", { style: { background: named(part)[1], flex: `${s / total} 0 0` }, title: `${named(part)[0]}: ${duration(s)}` }))),
      el("table", { class: "parts" }, ...seconds.map(([part, s]) => el("tr", {}, el("td", {}, el("i", { style: { background: named(part)[1] } }), named(part)[0]), el("td", { class: "soft" }, duration(s)), el("td", {}, `${((100 * s) / total).toFixed(1)} %`))))) : null));
}

// ---- config ----------------------------------------------------------------------------------------------------------

function yamlLines(value, indent = "") {
  if (value === null || typeof value !== "object") return [];
  const scalar = (v) => v === null ? "null" : typeof v === "object" ? (Array.isArray(v) ? "[]" : "{}") : String(v);
  const isLeaf = (v) => v === null || typeof v !== "object" || !Object.keys(v).length;
  const items = Array.isArray(value) ? value.map((v) => ["-", v]) : Object.entries(value).map(([k, v]) => [`${k}:`, v]);
  return items.flatMap(([key, v]) => {
    if (isLeaf(v)) return [[indent, key, scalar(v)]];
    const inner = yamlLines(v, indent + "  ");
    // The first line of an item of a list stands beside its dash.
    return key === "-" ? [[`${indent}- `, ...inner[0].slice(1)], ...inner.slice(1)] : [[indent, key, ""], ...inner];
  });
}
function configuration() {
  if (!data.config) return null;
  const lines = yamlLines(config);
  const text = el("pre", {}, ...lines.flatMap(([indent, key, value]) => [indent, el("span", { class: "key" }, key), " ", el("span", { class: value === "null" ? "none" : "" }, value), "\n"]));
  const copy = el("button", { class: "icon", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      copy.textContent = "copied";
    } catch {  // a browser that does not let a file do it
      getSelection().selectAllChildren(text);
    }
  } }, "copy");
  return section("Config", copy, el("div", { class: "card" }, text));
}

// ---- all of it -------------------------------------------------------------------------------------------------------

function redraw() {
  drawCharts();
  sparks.forEach((draw) => draw());
  densityDraws.forEach((draw) => draw());
}
function changed() {
  fillLegend();
  if (many) fillTable();
  if (hookpoints.length > 1 && names.length > 1) fillHeat();
  if (windows.length) fillDensities();
  drawCharts();
}
colorize();
document.getElementById("page").append(...[
  header(), headline(), toolbar(), training(), evaluation(), tradeOffs(), ...(tables() || []), densities(), time(), configuration(),
  el("footer", {}, `Made ${data.made} by python -m scale_sae.report from metrics.jsonl.`),
].filter(Boolean));
changed();
redraw();
new ResizeObserver(redraw).observe(document.getElementById("page"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
