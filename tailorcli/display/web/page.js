// Draws what the page's data describe: pictures by Vega-Lite, tables by DataTables.
const data = JSON.parse(document.getElementById("data").textContent);
const DataTable = tableLibrary.default;

const config = {
  background: "transparent",
  font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif",
  view: { stroke: null },
  axis: {
    labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--line)", domainColor: "var(--line)",
    tickColor: "var(--line)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8,
    labelLimit: 130,
  },
  legend: {
    orient: "top", title: null, labelColor: "var(--ink)", labelFontSize: 12.5, symbolStrokeWidth: 2.5, columns: 0,
    labelLimit: 340, rowPadding: 4, symbolOpacity: 1,
  },
};

for (const place of document.querySelectorAll("[data-chart]")) {
  const spec = { ...data.charts[place.dataset.chart] };
  const narrow = place.clientWidth < 480;
  spec.config = narrow ? { ...config, legend: { ...config.legend, columns: 1 } } : config;
  spec.autosize = { type: "fit-x", contains: "padding" };
  const options = { mode: "vega-lite", actions: false, renderer: "svg", tooltip: { theme: "custom" } };
  if (narrow && spec.usermeta?.narrow) Object.assign(spec, spec.usermeta.narrow);
  const drawn = await vegaEmbed(place, spec, options);
  drawn.view.addEventListener("click", (event, item) => {
    if (item?.datum?.command) showCommand(place, item.datum);
  });
}
document.body.dataset.drawn = "yes";

function showCommand(place, datum) {
  let box = place.parentNode.querySelector(".command");
  if (!box) {
    box = document.createElement("div");
    box.className = "command";
    box.append(copyButton(() => box.querySelector("pre").textContent), document.createElement("pre"));
    place.after(box);
  }
  box.querySelector("pre").textContent = datum.command;
}

function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", () => copy(button, text()));
  return button;
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that was opened from a disk may have no clipboard: the old way
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 4000);
}

for (const button of document.querySelectorAll("section > .command > .copy")) {
  button.addEventListener("click", () => copy(button, button.parentNode.querySelector("pre").textContent));
}

const text = DataTable.render.text().display;
const small = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en");
const shown = {
  text, name: text, long: text,
  count: (value) => whole.format(value),
  percent: (value) => (value >= 0.001 || value === 0 ? `${(100 * value).toFixed(1)}%` : `${small.format(100 * value)}%`),
  score: (value) => value.toFixed(1),
  number: (value) => small.format(value),
  command: () => "",
};
const isText = (kind) => ["text", "name", "long", "command"].includes(kind);

for (const element of document.querySelectorAll("[data-table]")) {
  const { columns, rows, filters } = data.tables[element.dataset.table];
  const table = new DataTable(element, {
    data: rows,
    columns: columns.map(([title, kind]) => ({
      title: text(title), // DataTables takes it for HTML
      type: isText(kind) ? "string" : "num",
      className: isText(kind) ? kind : "dt-right",
      orderable: kind !== "command",
      createdCell: kind !== "command" ? undefined : (cell, value) => value && cell.append(copyButton(() => value)),
      render: (value, what) => {
        if (value === null) return what === "sort" || what === "type" ? -1 : "";
        return what === "display" ? shown[kind](value) : value;
      },
    })),
    order: [],
    pageLength: 25,
    lengthMenu: [10, 25, 100, { label: "all", value: -1 }],
    autoWidth: false,
    layout: { topStart: null, topEnd: "search", bottomStart: ["info", "pageLength"], bottomEnd: "paging" },
    language: { search: "", searchPlaceholder: "Search", info: "_START_ to _END_ of _TOTAL_", lengthMenu: "_MENU_ a page" },
  });
  for (const column of filters) chooseOf(table, column, columns[column][0], document.getElementById(`filters-${element.dataset.table}`));
}
document.body.dataset.ready = "yes";

function chooseOf(table, column, title, place) {
  const values = new Set(table.column(column).data().toArray().filter((value) => value !== null && value !== ""));
  if (values.size < 2) return;
  const label = document.createElement("label");
  const select = document.createElement("select");
  label.append(`${title} `, select);
  select.append(new Option("all", ""));
  for (const value of values) select.append(new Option(value, value));
  select.addEventListener("change", () => {
    const wanted = select.value;
    table.column(column).search(wanted === "" ? "" : (value) => value === wanted).draw();
  });
  place.append(label);
}
