"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const MARGIN = { left: 48, right: 10, top: 10, bottom: 34 };
  const HEIGHT = 230;

  // Text is always set as text: what a model wrote is never read as markup.
  const node = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const svg = (name, attributes = {}, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };

  const short = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(size >= 1000 ? 4 : 3)));
  };
  const shown = (value, chart) => (chart.unit === "%" ? `${short(100 * value)}%` : short(value));

  const ticks = (low, high, count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  };

  const range = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (value === null || value === undefined) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low > high) return [0, 1];
    const margin = high > low ? 0.05 * (high - low) : Math.abs(high) * 0.1 || 1;
    // What is never negative is not drawn as if it could be.
    return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
  };

  // Runs of points without a gap.
  const pieces = (series, fit) => {
    const found = [[]];
    series.x.forEach((x, i) => {
      const values = fit(i);
      if (values.every((value) => value !== null && value !== undefined)) found[found.length - 1].push([x, ...values]);
      else if (found[found.length - 1].length) found.push([]);
    });
    return found.filter((piece) => piece.length);
  };

  const drawSeries = (chart, series, at) => {
    const color = series.slot % 8;
    const dash = series.slot >= 8 ? " dash" : "";
    const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${at.x(x).toFixed(1)} ${at.y(y).toFixed(1)}`).join("");
    const parts = [];
    if (chart.kind === "steps") {
      const corners = series.y.flatMap((y, i) => [[series.x[i], y], [series.x[i + 1], y]]);
      const outline = [[series.x[0], 0], ...corners, [series.x.at(-1), 0]];
      parts.push(svg("path", { class: `band f${color}`, d: path(outline) + "Z" }));
      parts.push(svg("path", { class: `curve s${color}${dash}`, d: path(outline) }));
      return parts;
    }
    if (series.lo) {
      for (const piece of pieces(series, (i) => [series.lo[i], series.hi[i]])) {
        const edge = [...piece.map(([x, low]) => [x, low]), ...piece.toReversed().map(([x, , high]) => [x, high])];
        parts.push(svg("path", { class: `band f${color}`, d: path(edge) + "Z" }));
      }
    }
    const dots = series.points || series.x.length === 1;
    if (!dots) for (const piece of pieces(series, (i) => [series.y[i]])) parts.push(svg("path", { class: `curve s${color}${dash}`, d: path(piece) }));
    else series.x.forEach((x, i) => parts.push(svg("circle", { class: `f${color}`, cx: at.x(x), cy: at.y(series.y[i]), r: 3 })));
    return parts;
  };

  const describe = (chart, series, i) => {
    const between = series.lo && series.lo[i] !== null && series.lo[i] !== series.hi[i];
    const interval = between ? ` (${shown(series.lo[i], chart)} to ${shown(series.hi[i], chart)})` : "";
    const seeds = series.n && series.n[i] > 1 ? `, ${series.n[i]} seeds` : "";
    return `${series.name}: ${shown(series.y[i], chart)}${interval}${seeds}`;
  };

  const draw = (figure, chart, hidden) => {
    figure.querySelector(".plot")?.remove();
    const plot = node("div", { class: "plot" });
    figure.querySelector("figcaption").after(plot);
    const width = Math.max(200, plot.clientWidth);
    const visible = chart.series.filter((series) => !hidden.has(series.name));
    const [left, right] = range(chart.series.flatMap((series) => [series.x[0], series.x.at(-1)]));
    const values = visible.flatMap((series) => [...series.y, ...(series.lo ?? []), ...(series.hi ?? [])]);
    const [bottom, top] = range(chart.kind === "line" ? values : [0, ...values]);
    const floor = chart.kind === "line" ? bottom : 0;
    const at = {
      x: (x) => MARGIN.left + ((x - left) / (right - left)) * (width - MARGIN.left - MARGIN.right),
      y: (y) => HEIGHT - MARGIN.bottom - ((y - floor) / (top - floor)) * (HEIGHT - MARGIN.top - MARGIN.bottom),
    };
    const last = visible.filter((series) => series.y.length).map((series) => describe(chart, series, series.y.length - 1));
    const label = `${chart.title}. ${chart.kind === "line" ? "At the end: " : ""}${last.join("; ")}`;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, tabindex: 0, role: "img", "aria-label": label });
    for (const y of ticks(floor, top, 4)) {
      picture.append(svg("line", { class: "gridline", x1: MARGIN.left, x2: width - MARGIN.right, y1: at.y(y), y2: at.y(y) }));
      picture.append(svg("text", { x: MARGIN.left - 6, y: at.y(y) + 4, "text-anchor": "end" }, shown(y, chart)));
    }
    for (const x of ticks(left, right, Math.max(2, Math.floor(width / 90)))) {
      if (chart.kind === "line" && !Number.isInteger(x)) continue;
      picture.append(svg("text", { x: at.x(x), y: HEIGHT - 18, "text-anchor": "middle" }, short(x)));
    }
    const base = HEIGHT - MARGIN.bottom;
    picture.append(svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: base, y2: base }));
    picture.append(svg("text", { x: (MARGIN.left + width) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, chart.x));
    for (const series of visible) picture.append(...drawSeries(chart, series, at));
    plot.append(picture);
    if (chart.kind === "line") addCursor(plot, picture, chart, visible, at, width);
  };

  const addCursor = (plot, picture, chart, visible, at, width) => {
    const steps = [...new Set(visible.flatMap((series) => series.x))].sort((a, b) => a - b);
    if (!steps.length) return;
    const line = svg("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    const tip = node("div", { class: "tip", role: "status", hidden: "" });
    picture.append(line);
    plot.append(tip);
    let place = -1;
    const show = (index) => {
      place = Math.min(Math.max(index, 0), steps.length - 1);
      const step = steps[place];
      const lines = visible.filter((series) => series.x.includes(step)).map((series) => describe(chart, series, series.x.indexOf(step)));
      line.setAttribute("x1", at.x(step));
      line.setAttribute("x2", at.x(step));
      line.setAttribute("visibility", "visible");
      tip.textContent = [`${chart.x} ${short(step)}`, ...lines].join("\n");
      tip.hidden = false;
      const beyond = at.x(step) > width / 2;
      tip.style.left = beyond ? "" : `${at.x(step) + 8}px`;
      tip.style.right = beyond ? `${width - at.x(step) + 8}px` : "";
    };
    const hide = () => {
      line.setAttribute("visibility", "hidden");
      tip.hidden = true;
    };
    picture.addEventListener("pointermove", (event) => {
      const x = event.clientX - picture.getBoundingClientRect().left;
      const distance = (i) => Math.abs(at.x(steps[i]) - x);
      show(steps.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0));
    });
    picture.addEventListener("pointerleave", hide);
    picture.addEventListener("blur", hide);
    picture.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(moves[event.key]);
    });
  };

  const addLegend = (figure, chart, hidden, redraw) => {
    if (chart.series.length < 2) return;
    const legend = node("div", { class: "legend" });
    for (const series of chart.series) {
      const mark = svg("svg", { viewBox: "0 0 24 10", "aria-hidden": "true" });
      mark.append(svg("line", { class: `curve s${series.slot % 8}${series.slot >= 8 ? " dash" : ""}`, x1: 0, x2: 24, y1: 5, y2: 5 }));
      const button = node("button", { type: "button", "aria-pressed": "true" }, mark, series.name);
      button.addEventListener("click", () => {
        if (!hidden.delete(series.name)) hidden.add(series.name);
        button.setAttribute("aria-pressed", String(!hidden.has(series.name)));
        redraw();
      });
      legend.append(button);
    }
    figure.append(legend);
  };

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = data.charts[Number(figure.dataset.chart)];
    const hidden = new Set();
    const redraw = () => draw(figure, chart, hidden);
    addLegend(figure, chart, hidden, redraw);
    redraw();
    let width = figure.clientWidth;
    new ResizeObserver(() => {
      if (figure.clientWidth === width) return;
      width = figure.clientWidth;
      redraw();
    }).observe(figure);
  }

  const theme = document.getElementById("theme");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  systemDark.addEventListener("change", nameTheme);
  nameTheme();

  if (data.completions.length) browse(data.completions);

  function browse(all) {
    const [run, step, place, scale, list] = ["run", "step", "token", "scale", "samples"].map((id) => document.getElementById(id));
    const shade = () => document.querySelector('input[name="shade"]:checked').value;
    const ofRun = () => all.filter((sample) => sample.run === run.value);
    const fill = (select, values) => select.replaceChildren(...values.map((value) => node("option", { value }, value)));

    const tint = (value, largest) => {
      if (value === null || !largest) return "";
      if (shade() === "uncertainty") return `rgb(var(--unsure) / ${(0.65 * Math.sqrt(value / largest)).toFixed(3)})`;
      return `rgb(var(${value < 0 ? "--minus" : "--plus"}) / ${((0.65 * Math.abs(value)) / largest).toFixed(3)})`;
    };

    const tokens = (sample, largest) => {
      const planning = new Set(sample.planning);
      const box = node("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Completion; arrow keys move through its tokens" });
      sample.tokens.forEach((text, i) => {
        const context = sample.advantages[i] === null;
        const token = node("span", { class: context ? "context" : planning.has(i) ? "planning" : "" }, text);
        token.style.backgroundColor = tint(sample[shade()][i], largest);
        token.dataset.i = i;
        box.append(token);
      });
      let here = -1;
      const tell = (i) => {
        if (i < 0 || i >= sample.tokens.length) return;
        box.children[here]?.classList.remove("here");
        here = i;
        box.children[i].classList.add("here");
        const kind = sample.advantages[i] === null ? "written by the environment"
          : `advantage ${short(sample.advantages[i])}, uncertainty ${short(sample.uncertainty[i])}${planning.has(i) ? ", plans" : ""}`;
        place.textContent = `${JSON.stringify(sample.tokens[i])}, token ${i + 1} of ${sample.tokens.length + sample.cut}: ${kind}`;
      };
      for (const kind of ["pointerover", "click"]) {
        box.addEventListener(kind, (event) => { if (event.target.dataset.i) tell(Number(event.target.dataset.i)); });
      }
      box.addEventListener("keydown", (event) => {
        const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: sample.tokens.length - 1 };
        if (!(event.key in moves)) return;
        event.preventDefault();
        tell(moves[event.key]);
        box.children[here]?.scrollIntoView({ block: "nearest" });
      });
      return box;
    };

    const show = () => {
      const samples = ofRun().filter((sample) => String(sample.step) === step.value);
      const sizes = samples.flatMap((sample) => sample[shade()]).map((value) => Math.abs(value ?? 0));
      const largest = sizes.reduce((a, b) => Math.max(a, b), 0);
      scale.textContent = shade() === "uncertainty"
        ? `Full shade: uncertainty ${short(largest)}; the shade goes with its square root.`
        : `Full shade: advantage +${short(largest)} (blue) or -${short(largest)} (orange).`;
      list.replaceChildren(...samples.map((sample) => {
        const reward = sample.reward === null ? "none" : short(sample.reward);
        const facts = `Reward ${reward}, advantage ${short(sample.advantage)}${sample.lambda === null ? "" : `, SEPA lambda ${short(sample.lambda)}`}${sample.finish === "length" ? ", cut at max_tokens" : ""}`;
        const cut = sample.cut ? [node("p", {}, `${sample.cut} more tokens are not on this page.`)] : [];
        const prompt = node("p", { class: "prompt", tabindex: "0" }, `${sample.prompt}\nReference: ${sample.reference}`);
        return node("article", {}, node("h3", {}, facts), prompt, tokens(sample, largest), ...cut);
      }));
    };
    const showRun = () => {
      fill(step, [...new Set(ofRun().map((sample) => sample.step))]);
      step.selectedIndex = step.options.length - 1;
      show();
    };
    const move = (by) => {
      step.selectedIndex = Math.min(Math.max(step.selectedIndex + by, 0), step.options.length - 1);
      show();
    };
    fill(run, [...new Set(all.map((sample) => sample.run))]);
    run.addEventListener("change", showRun);
    step.addEventListener("change", show);
    document.getElementById("earlier").addEventListener("click", () => move(-1));
    document.getElementById("later").addEventListener("click", () => move(1));
    for (const choice of document.querySelectorAll('input[name="shade"]')) choice.addEventListener("change", show);
    showRun();
  }
})();
