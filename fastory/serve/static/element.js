// Elements of the page. Texts become text nodes, never markup.

/** An element with properties (attributes where there is no such property) and children: elements and texts. */
export function element(name, properties = {}, children = []) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key === "dataset") Object.assign(made.dataset, value);
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A button with a text; `title` says its key, too. */
export function button(text, onclick, properties = {}) {
  return element("button", { type: "button", onclick, ...properties }, [text]);
}
