(function () {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);

  // The contents are open beside a wide page. On a narrow one they close after a choice.
  const contents = document.querySelector("#contents details");
  const wide = window.matchMedia("(min-width: 72rem)");
  const follow = () => (contents.open = wide.matches);
  wide.addEventListener("change", follow);
  follow();
  contents.addEventListener("click", (event) => {
    if (event.target.closest("a") && !wide.matches) contents.open = false;
  });

  // Mark the section in view.
  const links = [...document.querySelectorAll("#contents a")];
  const steps = links.map((link) => document.querySelector(link.getAttribute("href")));
  function mark() {
    let current = 0;
    steps.forEach((step, i) => {
      if (step.getBoundingClientRect().top < window.innerHeight / 3) current = i;
    });
    links.forEach((link, i) => {
      if (i === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
  }
  document.addEventListener("scroll", mark, { passive: true });
  mark();

  // A link into something folded opens it.
  function unfold() {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    for (let part = target; part; part = part.parentElement) {
      if (part.tagName === "DETAILS") part.open = true;
    }
    if (target) target.scrollIntoView();
  }
  window.addEventListener("hashchange", unfold);
  unfold();

  // Press a task in the heat map: its samples appear below it.
  function listSamples(button) {
    const row = button.closest("tr");
    const task = data.tasks[button.dataset.task];
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) {
      while (row.nextSibling && row.nextSibling.className === "sample") row.nextSibling.remove();
      return;
    }
    [...task.listed].reverse().forEach(([text, shares, number]) => {
      const line = document.createElement("tr");
      line.className = "sample";
      const head = line.appendChild(document.createElement("th"));
      head.scope = "row";
      head.textContent = text + " ";
      if (number >= 0) {
        const opener = head.appendChild(document.createElement("button"));
        opener.type = "button";
        opener.dataset.sample = number;
        opener.textContent = "try it";
        opener.setAttribute("aria-label", "try this sample in the explorer");
      }
      shares.forEach((share) => {
        const cell = line.insertCell();
        cell.className = "cell";
        cell.style.setProperty("--v", share / 100);
        cell.textContent = (share / 100).toFixed(2);
      });
      row.after(line);
    });
  }
  document.querySelectorAll("[data-task]").forEach((button) => {
    button.addEventListener("click", () => listSamples(button));
  });
})();
