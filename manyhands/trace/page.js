(() => {
  const tip = document.getElementById("tip"), letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
  const expert = (plot, row) => {
    const group = +plot.dataset.group, first = Math.round(row * group), last = Math.round((row + 1) * group) - 1;
    return last > first ? `experts ${first}–${last}` : `expert ${first}`;
  };
  const within = (share, n) => Math.max(0, Math.min(n - 1, Math.floor(share * n)));
  const range = plot => plot.range ??= JSON.parse(plot.dataset.range);
  const at = (plot, x) => {
    const [x0, x1] = range(plot);
    return `${plot.dataset.x} ${x1 - x0 > 50 ? Math.round(x) : +x.toPrecision(3)}`;
  };
  const texts = {
    line(plot, fx) {
      const [x0, x1] = range(plot), x = x0 + fx * (x1 - x0);
      const near = (plot.series ??= JSON.parse(plot.dataset.hover)).map(s => {
        let best = -1;
        s.x.forEach((v, i) => { if (s.y[i] !== null && (best < 0 || Math.abs(v - x) < Math.abs(s.x[best] - x))) best = i; });
        return best < 0 ? "" : `${s.name}  ${s.y[best]}` + (Math.abs(s.x[best] - x) > (x1 - x0) / 60 ? `  (at ${at(plot, s.x[best])})` : "");
      });
      return [at(plot, x), ...near.filter(Boolean).slice(0, 16)].join("\n");
    },
    heat(plot, fx, fy) {
      const [x0, x1] = range(plot), columns = +plot.dataset.columns, row = within(fy, +plot.dataset.rows);
      const level = letters.indexOf(plot.dataset.levels[row * columns + within(fx, columns)]);
      const load = level === 0 ? (+plot.dataset.group > 1 ? "one of them nothing" : "nothing") : level === 61 ? "2× its share or more" : `${((level - 1) / 30).toFixed(2)}× its share`;
      return `${expert(plot, row)}, ${at(plot, x0 + fx * (x1 - x0))}\n${load}`;
    },
    bars(plot, fx, fy) {
      const row = within(fy, +plot.dataset.rows);
      return `${expert(plot, row)}, final load\n${JSON.parse(plot.dataset.final)[row].toFixed(2)}× its share`
        + (plot.dataset.dead[row] === "1" && +plot.dataset.group > 1 ? "\none of them nothing" : "");
    },
  };
  for (const plot of document.querySelectorAll(".plot[data-range], .plot.bars")) {
    const kind = plot.classList.contains("heat") ? "heat" : plot.classList.contains("bars") ? "bars" : "line";
    const cursor = plot.appendChild(document.createElement("div"));
    let fx = 1, fy = 0;
    cursor.className = "cursor";
    const show = (left, top) => {
      tip.textContent = texts[kind](plot, fx, fy);
      tip.style.display = "block";
      tip.style.left = Math.max(4, Math.min(left + 14, innerWidth - tip.offsetWidth - 8)) + "px";
      tip.style.top = Math.max(4, Math.min(top + 14, innerHeight - tip.offsetHeight - 8)) + "px";
      if (kind === "line") { cursor.style.display = "block"; cursor.style.left = 100 * fx + "%"; }
    };
    const hide = () => { tip.style.display = cursor.style.display = "none"; };
    const share = value => Math.max(0, Math.min(1, value));
    plot.tabIndex = 0;
    plot.addEventListener("pointermove", event => {
      const box = plot.getBoundingClientRect();
      fx = share((event.clientX - box.left) / box.width); fy = share((event.clientY - box.top) / box.height);
      show(event.clientX, event.clientY);
    });
    plot.addEventListener("keydown", event => {
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
      if (event.key === "Escape") hide();
      if ((!dx || kind === "bars") && (!dy || kind === "line")) return;
      const box = plot.getBoundingClientRect(), rows = +plot.dataset.rows || 1;
      event.preventDefault();
      fx = share(fx + dx / 50); fy = share(Math.floor(share(fy) * rows + dy + .001) / rows);
      show(box.left + fx * box.width, box.top + Math.min(fy + .5 / rows, 1) * box.height);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
  }
})();
