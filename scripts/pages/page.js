"use strict";
// The page: reads the form, shows the answer of answer.js in two languages. Settings are kept in the URL.
const FILE = JSON.parse(document.getElementById("file").textContent);
const TEXTS = JSON.parse(document.getElementById("words").textContent);
const FIXED = document.body.dataset.model, CHOICES = ["model", "device", "precision", "recomputation", "sharding"];
const STACK = ["parameter", "optimizer_state", "ema", "input", "gradient", "activation", "temporary", "workspace"];
const el = (id) => document.getElementById(id);
let lang = "en", turn = 0;

const t = (key, values = {}) => TEXTS[lang][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
const number = (n) => n.toLocaleString(lang);
function bytes(n) {
  for (const [unit, scale] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]])
    if (n >= scale) return `${Number((n / scale).toPrecision(4)).toLocaleString(lang, { maximumFractionDigits: 3 })} ${unit}`;
  return `${n} B`;
}
function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const key in attributes) e.setAttribute(key, attributes[key]);
  e.append(...children);
  return e;
}
function svg(tag, attributes = {}, ...children) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const key in attributes) e.setAttribute(key, attributes[key]);
  e.append(...children);
  return e;
}
function table(heads, rows, numeric = 1) {
  const row = (cells, tag) => make("tr", {}, ...cells.map((cell, i) => {
    const first = tag === "td" && i === 0, kind = first ? "th" : tag;
    const attributes = kind === "th" ? { scope: first ? "row" : "col" } : {};
    return make(kind, { ...attributes, ...(i >= numeric ? { class: "n" } : {}) }, cell);
  }));
  return make("table", {}, make("thead", {}, row(heads, "th")), make("tbody", {}, ...rows.map((cells) => row(cells, "td"))));
}

// -- the form ----------------------------------------------------------------------------------------------
const label = (kind, name) => kind === "model" ? FILE.models[name].title : TEXTS[lang][`${kind}_${name}`] ?? name;
const optionsOf = (kind) => Object.keys(kind === "model" ? FILE.models : kind === "device" ? FILE.devices : FILE.choices[kind]);
function fillSelects(setting) {
  for (const kind of CHOICES) {
    const options = optionsOf(kind).map((name) => make("option", { value: name }, kind === "device" ? `${name} (${bytes(FILE.devices[name].memory)})` : label(kind, name)));
    el(kind).replaceChildren(...options);
    el(kind).value = setting[kind];
  }
}
function start(model) {
  const [batch, second] = FILE.models[model].start, plans = FILE.models[model].plans, usual = "bf16-autocast/none/none";
  const known = Object.keys(plans).filter((key) => !plans[key].problem);
  const [precision, recomputation, sharding] = (known.includes(usual) || !known.length ? usual : known[0]).split("/");
  return { model, batch, second, precision, recomputation, sharding };
}
function read() {
  const setting = Object.fromEntries(CHOICES.map((kind) => [kind, el(kind).value]));
  return { ...setting, batch: Number(el("batch").value), second: Number(el("second").value) };
}
function fromUrl() {
  const given = Object.fromEntries([location.search, location.hash].flatMap((part) => [...new URLSearchParams(part.slice(1))]));
  const model = FIXED ?? (FILE.models[given.model] ? given.model : Object.keys(FILE.models)[0]);
  const setting = { device: "H100-SXM", ...start(model) };
  for (const kind of CHOICES.slice(1)) if (optionsOf(kind).includes(given[kind])) setting[kind] = given[kind];
  for (const size of ["batch", "second"]) if (/^\d+$/.test(given[size] ?? "")) setting[size] = Number(given[size]);
  if (given.lang in TEXTS) lang = given.lang;
  else if (navigator.language.startsWith("ja")) lang = "ja";
  return setting;
}
function showRanges(setting) {
  const model = FILE.models[setting.model], [low, high] = [model.seconds[0], model.seconds.at(-1)];
  el("batch").max = model.batches.at(-1);
  const range = t("range", { low: 1, high: number(model.batches.at(-1)) }), total = number(setting.batch * FILE.ranks);
  el("batch-range").textContent = range + (setting.sharding === "none" ? "" : t("total", { total }));
  el("second-field").hidden = !model.second;
  if (!model.second) return;
  el("second-label").textContent = `${t(model.second)}${lang === "ja" ? "（" : " ("}${t(`units_${model.unit}`)}${lang === "ja" ? "）" : ")"}`;
  Object.assign(el("second"), { min: low, max: high, step: model.multiple });
  el("second-range").textContent = t(model.multiple > 1 ? "multiples" : "range", { low: number(low), high: number(high), multiple: model.multiple });
}

// -- the answer ----------------------------------------------------------------------------------------------
function showVerdict(setting, result) {
  const model = FILE.models[setting.model], verdict = el("verdict");
  const values = { low: number(model.seconds[0]), high: number(model.seconds.at(-1)), batch: number(model.batches.at(-1)), multiple: model.multiple };
  if (result.run) {
    verdict.className = "headline unknown";
    const lead = result.run === "number" ? [] : [make("strong", {}, t("unknown")), " "]; // no command answers that
    verdict.replaceChildren(...lead, t(`run_${result.run}`, values));
    return;
  }
  const [value, , needed] = result.device.map(bytes);
  const kind = result.fits ? "fits" : result.device[0] <= result.memory ? "fits_maybe" : "fits_not";
  verdict.className = `headline ${kind}`;
  verdict.textContent = t(kind, { value, needed, memory: bytes(result.memory) });
}
function showFigures(result) {
  el("bar").replaceChildren(); el("figures").replaceChildren();
  if (result.run) return;
  const full = Math.max(result.device[2], result.memory), pct = (n) => `${(100 * n / full).toFixed(2)}%`;
  const values = { value: bytes(result.device[0]), needed: bytes(result.device[2]), memory: bytes(result.memory) };
  const limit = pct(result.memory);
  el("bar").append(svg("svg", { class: `bar need ${result.fits ? "yes" : "no"}`, height: 30, role: "img", "aria-label": t("bar_alt", values) },
    svg("rect", { class: "track", x: 0, y: 5, height: 20, width: "100%" }),
    svg("rect", { class: "upper", x: 0, y: 5, height: 20, width: pct(result.device[2]) }),
    svg("rect", { class: "value", x: 0, y: 5, height: 20, width: pct(result.device[0]) }),
    svg("line", { class: "limit", x1: limit, x2: limit, y1: 0, y2: 30 })));
  const rows = [["allocated", result.allocated], ["reserved", result.reserved], ["on_device", result.device]].map(([name, [v, low, high]]) =>
    [t(name), bytes(v), `${bytes(low)} – ${bytes(high)}`]);
  rows.push([t("memory"), bytes(result.memory), ""]);
  el("figures").append(table([t("figure"), t("expected"), t("interval")], rows));
}
function showTimeline(result) {
  const { points, spans, categories } = result.line, width = 1000, height = 240, top = Math.max(...points.map((p) => p.total)) * 1.05;
  const shown = STACK.filter((name) => categories.includes(name) && points.some((p) => p.bytes[categories.indexOf(name)] > 0));
  const below = points.map(() => 0), x = (i) => (width * i / points.length).toFixed(1), y = (n) => (height * (1 - n / top)).toFixed(1);
  const paths = shown.map((name) => {
    const place = categories.indexOf(name);
    let up = "", down = "";
    points.forEach((p, i) => {
      down = `L${x(i + 1)},${y(below[i])}L${x(i)},${y(below[i])}${down}`;
      below[i] += p.bytes[place];
      up += `${i ? "L" : "M"}${x(i)},${y(below[i])}L${x(i + 1)},${y(below[i])}`;
    });
    return svg("path", { class: `c-${name}`, d: `${up}${down}Z` });
  });
  const unit = 2 ** Math.floor(Math.log2(top / 3)), lines = [];
  for (let n = 0; n < top; n += unit) {
    lines.push(svg("line", { class: "grid", x1: 0, x2: "100%", y1: y(n), y2: y(n) }), svg("text", { class: "y", x: -8, y: y(n), dy: ".35em" }, bytes(n)));
  }
  const letter = lang === "ja" ? 14 : 8, plot = el("timeline").clientWidth; // a phase is named where its name has room
  const names = spans.flatMap(([phase, from, to]) => [
    svg("line", { class: "cut", x1: `${100 * to}%`, x2: `${100 * to}%`, y1: 0, y2: height }),
    ...((to - from) * plot > letter * TEXTS[lang].phases[phase].length ? [svg("text", { class: "x", x: `${50 * (from + to)}%`, y: height + 18 }, TEXTS[lang].phases[phase])] : [])]);
  const alt = t("timeline_alt", { peak: bytes(result.peak.bytes), phase: TEXTS[lang].phases[result.peak.phase] });
  const inner = svg("svg", { width: "100%", height, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" }, ...paths);
  el("timeline").replaceChildren(svg("svg", { class: "plot", role: "img", "aria-label": alt, height }, ...lines, inner, ...names));
  el("key").replaceChildren(...shown.slice().reverse().map((name) => make("li", { class: `c-${name}` }, make("i"), TEXTS[lang].categories[name])));
  el("timeline-lead").textContent = t("timeline_lead", { phase: TEXTS[lang].phases[result.peak.phase] });
}
function showHolders(result) {
  const total = result.peak.bytes, share = (n) => `${(100 * n / total).toFixed(1)} %`;
  const parts = STACK.filter((name) => result.categories[name]).map((name) => [name, result.categories[name]]);
  let from = 0;
  const boxes = parts.map(([name, n]) => {
    const box = svg("rect", { class: `c-${name}`, x: `${100 * from / total}%`, y: 3, height: 18, width: `${100 * n / total}%` });
    from += n;
    return box;
  });
  const rows = parts.sort((a, b) => b[1] - a[1]).map(([name, n]) => [make("span", { class: `c-${name} mark` }, make("i"), TEXTS[lang].categories[name]), bytes(n), share(n)]);
  el("categories").replaceChildren(svg("svg", { class: "bar", height: 24, "aria-hidden": "true" }, ...boxes), table([t("category"), t("bytes"), t("share")], rows));
  const most = result.holders.slice(0, 12), rest = result.holders.slice(12);
  const who = ({ part }) => { const [module, op] = part.split("\t"); return make("span", {}, module ? make("code", {}, module) : t("root"), " ", make("code", { class: "op" }, op)); };
  const lines = most.map((h) => [who(h), TEXTS[lang].categories[h.category], bytes(h.bytes), share(h.bytes), number(h.count)]);
  if (rest.length) {
    const sum = rest.reduce((n, h) => n + h.bytes, 0);
    lines.push([t("others", { count: rest.length }), "", bytes(sum), share(sum), number(rest.reduce((n, h) => n + h.count, 0))]);
  }
  el("holders").replaceChildren(table([t("part"), t("category"), t("bytes"), t("share"), t("count")], lines, 2));
}
function codeBox(name, text) {
  const button = make("button", { type: "button" }, t("copy"));
  button.onclick = () => navigator.clipboard.writeText(text).then(() => { button.textContent = t("copied"); });
  return make("div", { class: "code" }, make("p", {}, make("span", {}, name), button), make("pre", { tabindex: "0", "aria-label": name }, text));
}
function showCommands(setting, result) {
  const kinds = result.run === "number" ? [] : ["estimate", "largest"];
  el("commands").replaceChildren(...kinds.map((kind) => codeBox(t(`command_${kind}`), command(FILE, setting, kind, lang))));
}
function largestText(found) {
  if (!found) return t("largest_unknown");
  return t(found.next ? (found.value ? "largest_some" : "largest_none") : "largest_top", { value: number(found.value) });
}
async function showPlans(setting, mine) {
  if (!FIXED) return;
  el("plans-lead").textContent = t("plans_lead", { device: setting.device });
  const names = Object.keys(FILE.devices), rows = [];
  for (const precision of optionsOf("precision")) for (const sharding of optionsOf("sharding")) for (const recomputation of optionsOf("recomputation")) {
    const plan = { ...setting, precision, recomputation, sharding };
    if (refusal(FILE, { ...plan, batch: 1 }) === "combination") continue;
    const cells = [];
    for (const device of names) {
      const result = await answer(FILE, { ...plan, device }, false);
      if (mine !== turn) return;
      const text = result.run ? t("run") : `${result.fits ? "●" : "○"} ${bytes(result.device[2])}`;
      cells.push(make("span", result.run ? {} : { class: result.fits ? "yes" : "no" }, text, ...(result.run ? [] : [make("span", { class: "hidden" }, `, ${t(result.fits ? "yes" : "no")}`)])));
      await new Promise((done) => setTimeout(done));
    }
    const found = await largest(FILE, plan), parts = ["precision", "recomputation", "sharding"].filter((kind) => kind !== "recomputation" || recomputation !== "none");
    const link = make("a", { href: hash(plan) }, parts.map((kind) => label(kind, plan[kind])).join(lang === "ja" ? "、" : ", "));
    if (mine !== turn) return;
    rows.push([link, found ? `${found.next ? "" : "≥ "}${found.value}` : "?", ...cells]);
    el("plans").replaceChildren(table([t("plan"), t("largest"), ...names], rows));
  }
}
const hash = (setting) => `#${new URLSearchParams({ ...setting, lang })}`;
async function show() {
  const mine = ++turn, setting = read(), model = FILE.models[setting.model];
  showRanges(setting);
  history.replaceState(null, "", hash(setting));
  const result = await answer(FILE, setting);
  if (mine !== turn) return;
  showVerdict(setting, result); showFigures(result); showCommands(setting, result);
  el("bounded").hidden = !result.bounded;
  for (const section of document.querySelectorAll(".known")) section.hidden = Boolean(result.run);
  if (!result.run) { showTimeline(result); showHolders(result); }
  el("made").textContent = t("made", model.made);
  const found = await largest(FILE, setting);
  if (mine !== turn) return;
  el("largest").textContent = largestText(found);
  await showPlans(setting, mine);
}
function translate() {
  document.documentElement.lang = lang;
  for (const e of document.querySelectorAll("[data-t]")) e.textContent = t(e.dataset.t);
  for (const e of document.querySelectorAll("[data-t=documentation]")) e.href = lang === "ja" ? "../ja/index.html" : "../index.html";
  const title = FIXED ? t("model_title", { model: FILE.models[FIXED].title }) : t("title");
  document.title = el("title").textContent = title;
  el("language").textContent = t("language");
  el("language").lang = lang === "en" ? "ja" : "en";
}
function begin() {
  const setting = fromUrl();
  translate(); fillSelects(setting);
  el("batch").value = setting.batch; el("second").value = setting.second;
  show();
}
el("choices").addEventListener("submit", (event) => event.preventDefault());
el("choices").addEventListener("input", (event) => {
  if (event.target.id === "model") {
    const { batch, second } = start(el("model").value); // the plan stays as it was chosen
    el("batch").value = batch; el("second").value = second;
  }
  show();
});
el("language").onclick = () => {
  const setting = read();
  lang = lang === "en" ? "ja" : "en";
  translate(); fillSelects(setting); show();
};
addEventListener("hashchange", begin);
begin();
