// The training, step by step: the run of the page, beside its twin whose router stays at its start.
(function () {
  const element = (id) => document.getElementById(id);
  const { training } = JSON.parse(element("moved-data").textContent);
  const explored = JSON.parse(element("explorer-data").textContent);
  const TWINS = ["trained", "frozen"];
  const K = training.trained[0].w[0].length;
  const S = training.trained[0].Zhat[0].length;
  const FEWEST = 10; // per cent of w from which a cell shows its number

  // ------------------------------------------------------------------------------------ the tables

  // Add a row of K or S cells for each twin. Return the cells.
  function addRow(body, name, columns) {
    const row = body.insertRow();
    const head = row.appendChild(document.createElement("th"));
    head.scope = "row";
    head.append(...name);
    return TWINS.map((_, i) => {
      if (i > 0) row.insertCell().className = "gap";
      const cells = [];
      for (let column = 0; column < columns; column++) {
        cells.push(row.insertCell());
        cells[column].className = "cell";
      }
      return cells;
    });
  }

  // "task109_opposites" becomes "109", and the rest, which a narrow page hides.
  function nameOf(task) {
    const [number, ...rest] = task.replace("task", "").split("_");
    const long = document.createElement("span");
    long.className = "long";
    long.textContent = ` ${rest.join(" ")}`;
    return [number, long];
  }

  const seen = explored.tasks.filter((task) => task.kind === "seen");
  const taskCells = seen.map((task) => addRow(element("training-w"), nameOf(task.name), K));
  const rowCells = [];
  for (let k = 0; k < K; k++) {
    rowCells.push(addRow(element("training-Zhat"), [String(k + 1)], S));
  }

  // ------------------------------------------------------------------------------------- the curve

  const WIDTH = 320;
  const HEIGHT = 150;
  const EDGE = 28; // room for the numbers
  const losses = TWINS.map((twin) => training[twin].map((stop) => stop.loss));
  const highest = Math.ceil(Math.max(...losses.flat()));
  const lastStop = training.trained.length - 1;
  const x = (i) => EDGE + (i / lastStop) * (WIDTH - EDGE - 8);
  const y = (loss) => 8 + (1 - loss / highest) * (HEIGHT - EDGE - 8);

  function add(name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.textContent = text;
    return element("training-loss").appendChild(made);
  }

  for (let loss = 0; loss <= highest; loss++) {
    add("line", { x1: EDGE, x2: WIDTH - 8, y1: y(loss), y2: y(loss), class: "grid" });
    add("text", { x: EDGE - 6, y: y(loss) + 4, "text-anchor": "end" }, loss);
  }
  TWINS.forEach((twin, i) => {
    const points = losses[i].map((loss, number) => `${x(number)},${y(loss)}`);
    add("polyline", { points: points.join(" "), class: twin });
  });
  for (const i of [0, lastStop]) {
    const anchor = i === 0 ? "start" : "end";
    const label = `step ${training.trained[i].step}`;
    add("text", { x: x(i), y: HEIGHT - 8, "text-anchor": anchor }, label);
  }
  const marker = add("line", { y1: 4, y2: y(0), class: "marker" });

  // ------------------------------------------------------------------------------------ the slider

  function draw() {
    const i = Number(element("training-step").value);
    const stops = TWINS.map((twin) => training[twin][i]);
    stops.forEach((stop, twin) => {
      taskCells.forEach((cells, task) => {
        cells[twin].forEach((cell, k) => {
          const share = stop.w[task][k];
          cell.textContent = share >= FEWEST ? share : "";
          cell.style.setProperty("--v", share / 100);
        });
      });
      rowCells.forEach((cells, k) => {
        cells[twin].forEach((cell, s) => {
          const share = Math.round(100 * stop.Zhat[k][s]);
          cell.textContent = share >= FEWEST ? share : "";
          cell.style.setProperty("--v", share / 100);
        });
      });
    });
    marker.setAttribute("x1", x(i));
    marker.setAttribute("x2", x(i));
    const [trained, frozen] = stops;
    element("training-output").textContent = `step ${trained.step}`;
    element("training-says").textContent =
      `After ${trained.step} steps the loss on seen samples is ${trained.loss.toFixed(2)} with the ` +
      `router that trains, and ${frozen.loss.toFixed(2)} with the one that stays. w has moved ` +
      `${trained.distance.toFixed(2)} nats from its start.`;
  }

  element("training-step").max = lastStop;
  element("training-step").value = lastStop;
  element("training-step").addEventListener("input", draw);
  draw();
})();
