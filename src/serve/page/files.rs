//! The chat page's files: plain HTML, CSS and JavaScript that refer to nothing but each other and the server.

/// Address, type, contents.
pub type PageFile = (&'static str, &'static str, &'static [u8]);

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// All of the page.
pub const FILES: [PageFile; 10] = [
    ("/", HTML, include_bytes!("index.html")),
    ("/style.css", CSS, include_bytes!("style.css")),
    ("/icon.png", "image/png", include_bytes!("icon.png")),
    ("/app.js", SCRIPT, include_bytes!("app.js")),
    ("/markdown.mjs", SCRIPT, include_bytes!("markdown.mjs")),
    ("/model.mjs", SCRIPT, include_bytes!("model.mjs")),
    ("/pictures.mjs", SCRIPT, include_bytes!("pictures.mjs")),
    ("/protocol.mjs", SCRIPT, include_bytes!("protocol.mjs")),
    ("/store.mjs", SCRIPT, include_bytes!("store.mjs")),
    ("/view.mjs", SCRIPT, include_bytes!("view.mjs")),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn texts() -> impl Iterator<Item = (&'static str, &'static str)> {
        let is_text = |(_, kind, _): &PageFile| !kind.starts_with("image");
        FILES.into_iter().filter(is_text).map(|(path, _, bytes)| (path, std::str::from_utf8(bytes).unwrap()))
    }

    /// What follows each `mark` in `text`, up to `end`.
    fn after<'t>(text: &'t str, mark: &str, end: char) -> Vec<&'t str> {
        text.split(mark).skip(1).filter_map(|rest| rest.split(end).next()).collect()
    }

    #[test]
    fn the_page_refers_to_its_own_files_alone() {
        let known =
            |name: &str| FILES.iter().any(|(path, ..)| path.trim_start_matches('/') == name.trim_start_matches("./"));
        let mut references = 0;
        for (path, text) in texts() {
            assert!(!text.contains("://"), "{path} has a URL");
            assert!(
                path != "/style.css" || !text.contains("url(") && !text.contains("@import"),
                "{path} loads something"
            );
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
