// The page's elements, and the few things that are done to them everywhere.

// Every element with an id, under that id.
export const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));

export const element = (tag, props, text = "") =>
  Object.assign(document.createElement(tag), { textContent: text }, props);

// Writing only what changed keeps the user's text selection and avoids flicker.
export const setText = (node, text) => {
  if (node.textContent !== text) node.textContent = text;
};

export const setLines = (node, lines) => {
  setText(node, lines.join("\n"));
  node.hidden = lines.length === 0;
};

export const asList = (value) => (Array.isArray(value) ? value : []);

export const timeText = (at) => new Date(at).toLocaleTimeString();
