// The elements of the page, and shared helpers.

// All elements that have an id, by id.
export const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));

export const element = (tag, props, text = "") =>
  Object.assign(document.createElement(tag), { textContent: text }, props);

// Unchanged text is not written: this keeps the user's selection and avoids flicker.
export const setText = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

export const setLines = (node, lines) => {
  setText(node, lines.join("\n"));
  node.hidden = lines.length === 0;
};

export const asList = (value) => (Array.isArray(value) ? value : []);

export const timeText = (at) => new Date(at).toLocaleTimeString();
