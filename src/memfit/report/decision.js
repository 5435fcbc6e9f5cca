// The formulas of docs/decisions/014-money.md for the sliders, equal to those of decision/money.py; a test
// compares the two. Without this script the page is complete, but the sliders do nothing.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("decision-data").textContent);
  const HOURS = 8760;
  page.terms.setup_hours = page.sliders.setup.start; // of the plan, so that its range follows the slider
  const at = (amount, rate) => amount.usd * rate + amount.own;
  const annuity = (ratio, years) => {
    let sum = 0;
    for (let t = 1; t <= years; t++) sum += (1 + ratio) ** -t;
    return sum;
  };

  function sheet(way, terms) {
    const factor = !way.predicted ? 1 : way.plain ? terms.plain_time_factor : terms.recommended_time_factor;
    const works = way.kind !== "nothing", hours = way.hours * factor;
    const busy = hours / Math.min(way.parallel_count, Math.max(1, terms.runs_per_year)), yearly = busy * terms.runs_per_year;
    const pue = { desk: terms.desk_pue_ratio, cloud: terms.cloud_pue_ratio }[way.site] ?? terms.pue_ratio;
    const machines = works ? Math.max(1, Math.ceil(yearly / (HOURS * terms.utilisation_ratio) - 1e-9)) : 0;
    const taxed = 1 + terms.tax_ratio, kw = ((way.power_w ?? 0) / 1000) * pue;
    const purchase = (way.price ? at(way.price, terms.per_usd) * terms.hardware_factor : 0) * machines * taxed;
    const rent = way.per_hour ? at(way.per_hour, terms.per_usd) * terms.rental_factor : 0;
    const perKwh = at(terms.energy_per_kwh, terms.per_usd) + at(terms.levy_per_kwh, terms.per_usd);
    const basic = 12 * at(terms.basic_per_kw_month, terms.per_usd) * kw * machines;
    const electricity = way.kind === "cloud" ? 0 : (yearly * kw * perKwh + basic) * taxed;
    const rental = (yearly * rent + 12 * way.storage_per_month) * taxed;
    const people = way.operating_hours * terms.labour_per_hour, support = terms.support_ratio * purchase;
    const setup = way.setup_hours * terms.labour_per_hour;
    const years = terms.years, life = terms.life_years, times = Math.ceil(years / life);
    let bought = 0;
    for (let j = 0; j < times; j++) bought += purchase * (1 + terms.discount_ratio) ** -(life * j);
    const residual = (purchase * (times * life - years)) / life;
    const running = electricity + rental + people + support, worth = annuity(terms.discount_ratio, years);
    const value = terms.value_per_run, left = residual / (1 + terms.discount_ratio) ** years;
    const present = setup + bought + running * worth - left;
    const known = !works || way.kind === "cloud" || way.power_w !== null; // without its watts its cost is unknown
    const sure = (figure) => (known ? figure : null);
    return {
      machines, setup, purchase, residual, hours, initial: setup + purchase, electricity_per_year: sure(electricity),
      rental_per_year: rental, people_per_year: people, support_per_year: support, running_per_year: sure(running),
      present_cost: sure(present), cost_per_run: sure(present / (terms.runs_per_year * years)),
      net_present_value: !works ? 0 : value === null ? null : sure(value * terms.runs_per_year * worth - present),
      enough: (way.most_machines === null || machines <= way.most_machines)
        && (terms.longest_run_hours === null || hours <= terms.longest_run_hours),
      parts: [setup + bought - left, electricity * worth, rental * worth, (people + support) * worth],
    };
  }

  const saved = (one, other) => (one.present_cost !== null && other.present_cost > 0 ? 100 * (1 - one.present_cost / other.present_cost) : null);

  function picked(ways, sheets) {
    const among = (test) => {
      let best = null;
      ways.forEach((way, i) => {
        if (way.kind === "nothing" || !sheets[i].enough || sheets[i].present_cost === null || !test(way)) return;
        if (best === null || sheets[i].present_cost < sheets[best].present_cost) best = i;
      });
      return best;
    };
    const of = (kind, own) => among((w) => w.kind === kind && !(own && w.of_catalog));
    const slots = { purchase: of("purchase"), cloud: of("cloud"), nothing: 0 };
    for (const kind of ["purchase", "cloud"]) slots[`own_${kind}`] = page.own[kind] ? of(kind, true) : null;
    slots.reference = among((w) => w.plain && (w.kind === "purchase" || w.kind === "cloud"));
    for (const { slot, index } of page.slots) {
      if (slot.startsWith("existing") || (slots[slot] === null && sheets[index].present_cost === null)) slots[slot] = index;
    }
    return { slots, best: among(() => true) };
  }

  const minus = (text) => text.replace("-", "\u2212");
  const cash = (value) => {
    const digits = { minimumFractionDigits: page.decimals, maximumFractionDigits: page.decimals };
    const text = Math.abs(value).toLocaleString("en-US", digits);
    return minus((value < 0 && /[1-9]/.test(text) ? "-" : "") + page.symbol + text);
  };
  const short = (value) => {
    if (value === 0) return "0";
    const digits = Math.abs(value) < 1 ? 2 : 3;
    return minus(value.toLocaleString("en-US", { maximumSignificantDigits: digits, minimumSignificantDigits: digits }));
  };
  const many = (value) => {
    const ratio = 1 - value / 100;
    return ratio < 10 ? ratio.toPrecision(2) : Math.floor(ratio + 0.5).toLocaleString("en-US");
  };
  const percent = (value) => {
    if (value === null) return "\u2013";
    const text = `${short(value)} %`;
    return value < page.least ? page.many.replace("{value}", text).replace("{times}", many(value)) : text;
  };

  const still = (input) => Math.abs(Number(input.value) - page.sliders[input.name].start) <= Number(input.step) / 2;

  function moved() {
    // a slider has only its steps: if it was not moved, the exact number counts
    const value = (input) => (still(input) ? page.sliders[input.name].start : Number(input.value));
    const now = Object.fromEntries(inputs.map((input) => [input.name, value(input)]));
    const terms = structuredClone(page.terms), started = page.sliders;
    if (now.energy !== started.energy.start) {
      terms.energy_per_kwh = { usd: 0, own: now.energy };
      terms.levy_per_kwh = { usd: 0, own: 0 };
    }
    terms.hardware_factor = now.hardware;
    terms.labour_per_hour = now.labour;
    terms.runs_per_year = now.runs;
    terms.utilisation_ratio = now.utilisation;
    terms.setup_hours = now.setup;
    const more = now.setup - started.setup.start;
    const ways = page.ways.map((w) =>
      w.kind === "nothing" || w.plain ? w : { ...w, setup_hours: w.setup_hours + more, plan_hours: w.plan_hours + more });
    return { terms, ways, now };
  }

  const isAmount = (value) => value !== null && typeof value === "object";
  const times = (amount, ratio) => ({ usd: amount.usd * ratio, own: amount.own * ratio });

  // the terms and an option with one number changed, as in decision/monte_carlo.py; `rate`: price of a dollar
  function swung(terms, name, value, rate = terms.per_usd) {
    if (!(name in terms)) return terms;
    const now = terms[name];
    if (!isAmount(now)) return { ...terms, [name]: value };
    const whole = at(now, rate);
    return { ...terms, [name]: whole ? times(now, value / whole) : { usd: 0, own: value } };
  }

  // `factor`: on a price of the catalog, between its sellers
  function placed(way, terms, name, value, factor = 1) {
    const next = { ...way }, mine = page.own_terms;
    for (const [field] of page.offers) {
      if (way[field] !== null && way.priced_device) next[field] = times(way[field], factor);
    }
    if (name === "setup_hours" && !way.plain) next.setup_hours += value - terms.setup_hours;
    for (const [field, own, common] of page.offers) {
      if (way[field] === null || way.of_catalog || !(own in mine)) continue;
      const ratio = name === own && mine[own] ? value / mine[own] : name === common ? terms[common] / value : 1;
      next[field] = times(way[field], ratio);
    }
    return next;
  }

  // the lowest and highest factor between sellers on the prices of the best option and the reference
  function sellers(name, [best, reference]) {
    const same = best.priced_device !== "" && best.kind === reference.kind && best.priced_device === reference.priced_device;
    const ends = (way, on) => (on && way.priced_device ? [way.price_low_ratio, way.price_high_ratio] : [1, 1]);
    const first = name === "best_price_factor";
    return [ends(best, first), ends(reference, first ? same : name === "reference_price_factor" && !same)];
  }

  // a range that follows its slider
  function scaled(terms, name, end) {
    const size = (t) => (isAmount(t[name]) ? at(t[name], t.per_usd) : t[name]);
    return name in terms && size(page.terms) ? (end * size(terms)) / size(page.terms) : end;
  }

  // `way`: index of the option that the figure belongs to; its mark links to the record of that option
  function show(cell, text, value, way = null) {
    if (!cell) return;
    const num = cell.classList.contains("num") ? cell : cell.querySelector(".num");
    if (num) num.firstChild.data = text;
    else cell.textContent = text;
    if (num && way !== null && num.hash.startsWith("#way-")) {
      num.setAttribute("href", `#way-${way}`); // not as .hash, which would write the whole URL
      num.title = num.title.replace(/W\d+$/, `W${way}`);
      num.querySelector(".tag").setAttribute("aria-label", num.title);
    }
    cell.dataset.value = value;
  }

  // set-up, electricity and rental of one run, and its labour, as in decision/stages.py
  function oneRun(full, there) {
    const way = { ...full, hours: full.hours * page.stages.pilot_ratio };
    const part = Math.max(1, Math.ceil((12 * sheet(way, there).hours) / HOURS)) / 12;
    const basic = times(there.basic_per_kw_month, part);
    const terms = { ...there, runs_per_year: 1, years: 1, basic_per_kw_month: basic };
    const once = sheet({ ...way, storage_per_month: way.storage_per_month * part }, terms);
    if (once.electricity_per_year === null) return null;
    return { cost: once.setup + once.electricity_per_year + once.rental_per_year, people: once.people_per_year * part };
  }

  // the money of the stages, on the machines of the original figures
  function staged(terms, ways, sheets) {
    const { poc, pilot, full, ends } = page.stages, found = {};
    const perKwh = at(terms.energy_per_kwh, terms.per_usd) + at(terms.levy_per_kwh, terms.per_usd);
    if (poc) found.spent = (poc.energy_j / 3.6e6) * perKwh * (1 + terms.tax_ratio) + poc.hours * terms.labour_per_hour;
    const trial = pilot === null || ways[pilot].kind === "purchase" ? null : oneRun(ways[pilot], terms);
    if (trial) {
      let way = placed(ways[pilot], terms, "", 0, ways[pilot].price_high_ratio), dear = terms;
      for (const [name, bound] of Object.entries(ends)) {
        const end = scaled(terms, name, bound);
        way = placed(way, terms, name, end);
        dear = swung(dear, name, end, terms.per_usd);
      }
      const most = oneRun(way, dear);
      found.pilot = trial.cost;
      if (most) found.most = most.cost + most.people;
    }
    if (full !== null && sheets[full].present_cost !== null) {
      const [one, all] = [ways[pilot], ways[full]];
      const same = trial && one.kind === all.kind && one.machine === all.machine;
      const paid = trial ? Math.min(one.plan_hours, all.plan_hours) + (same ? all.setup_hours - all.plan_hours : 0) : 0;
      found.full = sheets[full].present_cost - paid * terms.labour_per_hour;
    }
    return found;
  }

  function draw() {
    const { terms, ways, now } = moved();
    const sheets = ways.map((way) => sheet(way, terms));
    const { slots, best } = picked(ways, sheets);
    const reference = slots.reference === null ? null : sheets[slots.reference];
    let widest = 0;
    const seen = [...document.querySelectorAll("tr[data-slot]")];
    for (const row of seen) {
      const index = slots[row.dataset.slot] ?? null;
      row.hidden = index === null || slots[`own_${row.dataset.slot}`] === index;
      if (index !== null) widest = Math.max(widest, sheets[index].parts.reduce((a, b) => a + b, 0));
    }
    for (const row of seen) {
      const index = slots[row.dataset.slot] ?? null;
      if (index === null) continue;
      const own = sheets[index], way = ways[index];
      row.querySelector("[data-name]").textContent = page.labels[index];
      row.querySelector("[data-plan]").textContent = page.plans[index];
      row.querySelector("[data-identifier]").textContent = page.identifiers[index];
      row.classList.toggle("best", index === best && row.dataset.slot !== "reference");
      row.querySelector("[data-enough]").hidden = own.enough;
      row.querySelector("[data-untried]").hidden = !way.untried.length;
      row.querySelector("[data-names]").textContent = page.untried[index];
      for (const cell of row.querySelectorAll("[data-figure]")) {
        const name = cell.dataset.figure;
        const value = name === "saved" ? (reference && way.kind !== "nothing" ? saved(own, reference) : null) : own[name];
        if (value !== null) show(cell, name === "saved" ? percent(value) : name === "machines" ? String(value) : cash(value), value, index);
      }
      row.querySelectorAll(".purse i").forEach((bar, part) => {
        bar.style.width = `${widest && own.present_cost !== null ? (100 * own.parts[part]) / widest : 0}%`;
      });
    }
    const live = (name, text, value) => document.querySelectorAll(`[data-live="${name}"]`).forEach((c) => show(c, text, value, best));
    if (best !== null) {
      live("best", page.labels[best], best);
      live("plan", page.plans[best], best);
      live("present", cash(sheets[best].present_cost), sheets[best].present_cost);
      live("initial", cash(sheets[best].initial), sheets[best].initial);
      live("running", cash(sheets[best].running_per_year), sheets[best].running_per_year);
      if (reference) {
        const share = saved(sheets[best], reference);
        live("saved", percent(share), share);
        live("reference", page.labels[slots.reference], slots.reference);
        const rows = [...document.querySelectorAll("[data-swing]")];
        const pair = [ways[best], ways[slots.reference]];
        const ends = rows.map((row) => {
          const { name, low, high } = page.swings.find((s) => s.name === row.dataset.swing);
          const factors = sellers(name, pair);
          return [low, high].map((bound, end) => {
            const value = scaled(terms, name, bound), next = swung(terms, name, value);
            return saved(...pair.map((way, i) => sheet(placed(way, terms, name, value, factors[i][end]), next))) ?? share;
          });
        });
        const all = [...ends.flat(), share], low = Math.min(...all), span = Math.max(...all) - low || 1;
        rows.forEach((row, i) => {
          const [a, b] = ends[i], bar = row.querySelector(".swing i");
          bar.style.left = `${(100 * (Math.min(a, b) - low)) / span}%`;
          bar.style.width = `${(100 * Math.abs(b - a)) / span}%`;
          show(row.querySelector("[data-end=low]"), percent(a), a);
          show(row.querySelector("[data-end=high]"), percent(b), b);
        });
      }
    }
    for (const [name, value] of Object.entries(staged(terms, ways, sheets))) {
      document.querySelectorAll(`[data-stage="${name}"]`).forEach((c) => {
        if (!c.closest("[data-still]")) show(c, cash(value), value);
      });
    }
    const start = inputs.every(still);
    document.querySelectorAll("[data-at-start]").forEach((e) => { e.hidden = start; });
    document.querySelectorAll("[data-of-start]").forEach((e) => { e.hidden = !start; });
    for (const input of inputs) {
      const money = input.name === "energy" || input.name === "labour";
      const text = input.name === "energy" ? page.symbol + short(now.energy) : money ? cash(now.labour)
        : input.name === "runs" ? now.runs.toLocaleString("en-US") : short(now[input.name]);
      document.getElementById(`out-${input.name}`).textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
  }

  const form = document.getElementById("sliders");
  const inputs = [...form.querySelectorAll("input[type=range]")];
  form.hidden = false;
  form.addEventListener("input", draw);
  form.addEventListener("reset", () => setTimeout(draw));
  draw();
})();
