// Boxes of characters on a picture, drawn with the pointer; in fractions of the picture.

const SVG = "http://www.w3.org/2000/svg";
const LEAST = 0.03; // of a side: less is a click

export class Boxes {
  constructor(changed) {
    this.changed = changed;
    this.boxes = new Map();
    this.active = false;
    this.nameOf = () => "";
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", "0 0 1 1");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.classList.add("boxing");
    this.svg.addEventListener("pointerdown", (event) => this.begin(event));
    this.svg.addEventListener("pointermove", (event) => this.drag(event));
    this.svg.addEventListener("pointerup", () => this.end());
    this.names = document.createElement("div"); // whose box it is; a text in the picture would be stretched with it
    this.names.className = "names";
  }

  set(entries) {
    this.boxes = new Map(entries.map(([name, box]) => [name, [...box]]));
    this.show();
  }

  object() {
    return Object.fromEntries(this.boxes);
  }

  at(event) {
    const { left, top, width, height } = this.svg.getBoundingClientRect();
    const within = (value) => Math.round(Math.min(1, Math.max(0, value)) * 1000) / 1000;
    return [within((event.clientX - left) / width), within((event.clientY - top) / height)];
  }

  begin(event) {
    if (!this.active || !this.nameOf()) return;
    this.svg.setPointerCapture(event.pointerId);
    this.from = this.at(event);
    this.earlier = new Map(this.boxes);
  }

  drag(event) {
    if (!this.from) return;
    const [x, y] = this.at(event);
    const [a, b] = this.from;
    this.boxes.set(this.nameOf(), [Math.min(a, x), Math.min(b, y), Math.max(a, x), Math.max(b, y)]);
    this.show();
  }

  end() {
    if (!this.from) return;
    this.from = undefined;
    const box = this.boxes.get(this.nameOf());
    if (box && (box[2] - box[0] < LEAST || box[3] - box[1] < LEAST)) this.boxes = this.earlier;
    this.show();
    this.changed();
  }

  show() {
    this.names.replaceChildren(...[...this.boxes].map(([name, [left, top]]) => {
      const label = document.createElement("span");
      label.textContent = name;
      label.style.left = `${100 * left}%`;
      label.style.top = `${100 * top}%`;
      return label;
    }));
    this.svg.replaceChildren(...[...this.boxes].map(([name, [left, top, right, bottom]]) => {
      const rect = document.createElementNS(SVG, "rect");
      const title = document.createElementNS(SVG, "title");
      title.textContent = name;
      for (const [key, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top, class: "box" })) rect.setAttribute(key, value);
      rect.append(title);
      return rect;
    }));
  }
}
