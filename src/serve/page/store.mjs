// The conversation over a reload: exchanges and pictures in IndexedDB. One tab keeps it; others begin empty and say so.

/** Opens the store; null where the browser has none, or another tab holds the conversation. */
export async function open() {
  if (!(await only())) return null;
  const database = await new Promise((done) => {
    try {
      const request = indexedDB.open("mbq-convert", 1);
      request.onupgradeneeded = () => ["conversation", "pictures"].forEach((name) => request.result.createObjectStore(name));
      request.onsuccess = () => done(request.result);
      request.onerror = request.onblocked = () => done(null);
    } catch {
      done(null);
    }
  });
  return database && new Store(database);
}

/** Whether this tab alone has the conversation; it does until it is closed. */
function only() {
  if (!navigator.locks) return true;
  return new Promise((done) => {
    // A page that is reloaded waits for its own earlier self.
    const options = { signal: AbortSignal.timeout(1000) };
    navigator.locks
      .request("mbq-convert conversation", options, () => {
        done(true);
        return new Promise(() => {});
      })
      .catch(() => done(false));
  });
}

class Store {
  #database;
  /** Pictures that are stored. */
  #known = new Set();
  /** Changes are made one after the other. */
  #last = Promise.resolve();
  /** Called where a change could not be written. */
  failed = () => {};

  constructor(database) {
    this.#database = database;
  }

  /** The exchanges of the last time, their pictures with fresh URLs; none where nothing is stored. */
  async load() {
    const transaction = this.#database.transaction(["conversation", "pictures"]);
    const exchanges = (await result(transaction.objectStore("conversation").get("exchanges"))) ?? [];
    const pictures = transaction.objectStore("pictures");
    for (const { question } of exchanges) {
      for (const picture of question.pictures) {
        picture.blob = await result(pictures.get(picture.id));
        this.#known.add(picture.id);
      }
      question.pictures = question.pictures.filter((picture) => picture.blob);
      for (const picture of question.pictures) picture.url = URL.createObjectURL(picture.blob);
    }
    return exchanges;
  }

  /** Writes the exchanges; a picture is written once, and removed with the last exchange that has it. */
  save(exchanges) {
    const pictures = exchanges.flatMap(({ question }) => question.pictures);
    const plain = exchanges.map(({ question, answer }) => ({
      question: { text: question.text, pictures: question.pictures.map(({ blob, url, ...rest }) => rest) },
      answer: { ...answer },
    }));
    this.#last = this.#last.then(() => this.#write(pictures, plain)).catch(() => this.failed());
    return this.#last;
  }

  async #write(pictures, exchanges) {
    const transaction = this.#database.transaction(["conversation", "pictures"], "readwrite");
    transaction.objectStore("conversation").put(exchanges, "exchanges");
    const stored = transaction.objectStore("pictures");
    const wanted = new Set(pictures.map(({ id }) => id));
    for (const { id, blob } of pictures) if (!this.#known.has(id)) stored.put(blob, id);
    for (const id of this.#known) if (!wanted.has(id)) stored.delete(id);
    await new Promise((done, failed) => {
      transaction.oncomplete = done;
      transaction.onerror = transaction.onabort = () => failed(transaction.error);
    });
    this.#known = wanted;
  }
}

function result(request) {
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}
