// What the browser keeps. Where it keeps nothing (storage off, private windows), the page works all the same.

function kept(storage) {
  return {
    get(name) {
      try {
        return storage().getItem(name);
      } catch {
        return null;
      }
    },
    set(name, value) {
      try {
        if (value === null || value === "") storage().removeItem(name);
        else storage().setItem(name, value);
      } catch {} // for this page only, then
    },
  };
}

/** Of this tab, until it is closed: the key and the session's id. */
export const tab = kept(() => sessionStorage);
/** Of this browser: theme and sampling. */
export const browser = kept(() => localStorage);
