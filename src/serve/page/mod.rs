//! The chat page, as the server sends it: plain files that refer to nothing but each other and the server.

/// A file of the page.
#[derive(Debug, Clone, Copy)]
pub struct PageFile {
    /// Below the server's root; `/` is the first file's.
    pub path: &'static str,
    pub media_type: &'static str,
    pub content: &'static [u8],
}

const fn file(path: &'static str, media_type: &'static str, content: &'static [u8]) -> PageFile {
    PageFile { path, media_type, content }
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// All of the page.
pub const FILES: [PageFile; 10] = [
    file("/", "text/html; charset=utf-8", include_bytes!("index.html")),
    file("/style.css", "text/css; charset=utf-8", include_bytes!("style.css")),
    file("/icon.png", "image/png", include_bytes!("icon.png")),
    file("/app.js", SCRIPT, include_bytes!("app.js")),
    file("/markdown.mjs", SCRIPT, include_bytes!("markdown.mjs")),
    file("/model.mjs", SCRIPT, include_bytes!("model.mjs")),
    file("/pictures.mjs", SCRIPT, include_bytes!("pictures.mjs")),
    file("/protocol.mjs", SCRIPT, include_bytes!("protocol.mjs")),
    file("/store.mjs", SCRIPT, include_bytes!("store.mjs")),
    file("/view.mjs", SCRIPT, include_bytes!("view.mjs")),
];

/// What a browser may load for the page: nothing from elsewhere, nothing written into it.
pub const POLICY: &str = "default-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'none'; \
                          frame-ancestors 'none'; object-src 'none'";

#[cfg(test)]
mod tests {
    use super::*;

    fn texts() -> impl Iterator<Item = (&'static str, &'static str)> {
        let text = |f: PageFile| (!f.media_type.starts_with("image")).then(|| std::str::from_utf8(f.content).unwrap());
        FILES.into_iter().filter_map(move |f| Some((f.path, text(f)?)))
    }

    /// What follows each `mark` in `text`, up to `end`.
    fn after<'t>(text: &'t str, mark: &str, end: char) -> Vec<&'t str> {
        text.split(mark).skip(1).filter_map(|rest| rest.split(end).next()).collect()
    }

    #[test]
    fn the_page_refers_to_its_own_files_alone() {
        let known = |name: &str| FILES.iter().any(|f| f.path.trim_start_matches('/') == name.trim_start_matches("./"));
        let mut references = 0;
        for (path, text) in texts() {
            for scheme in ["http:", "https:", "ws:", "wss:", "ftp:", "url(", "@import"] {
                assert!(!text.contains(scheme), "{path} has {scheme}");
            }
            let marks = [" src=\"", " href=\"", " action=\"", "from \"", "import(\""];
            for name in marks.iter().flat_map(|mark| after(text, mark, '"')) {
                assert!(name.starts_with('#') || known(name), "{path} refers to {name}");
                references += 1;
            }
            for name in after(text, "fetch(\"", '"') {
                assert!(["v1/models", "v1/chat/completions"].contains(&name), "{path} asks for {name}");
                references += 1;
            }
        }
        assert!(references > 12, "{references} found");
    }

    #[test]
    fn nothing_in_it_is_what_the_policy_forbids() {
        for (path, text) in texts() {
            let html = path == "/";
            let forbidden = ["<style", " style=", "javascript:", "eval(", "new Function"];
            let unsafe_ways = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "srcdoc", "DOMParser"];
            for word in forbidden.iter().chain(&unsafe_ways) {
                assert!(!text.contains(word), "{path} has {word}");
            }
            if html {
                assert!(after(text, "<script", '>').iter().all(|tag| tag.contains(" src=")), "a script of its own");
                assert!(after(text, " on", '>').iter().all(|rest| !rest.contains("=\"")), "a handler in an attribute");
            }
        }
    }
}
