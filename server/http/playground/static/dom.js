// Creates elements of the page.

/** Return a new element with properties, such as `className` or `htmlFor`, and children: elements or text. */
export function element(name, properties = {}, ...children) {
    const created = Object.assign(document.createElement(name), properties);
    created.append(...children);
    return created;
}
