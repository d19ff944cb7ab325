//! What the pages of `eval` and `report` share: one file without outside resources, readable light and dark, wide, on a
//! phone, on paper and by a screen reader (every number of a plot stands in a table too).
pub mod plot;

use crate::image::Rgb;
use base64::Engine;
use std::fmt::{Result, Write};

const STYLE: &str = include_str!("page.css");

/// A page as it grows.
pub fn open(out: &mut String, title: &str) -> Result {
    writeln!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        text(title)
    )
}

pub const END: &str = "</main>\n</body>\n</html>\n";

/// Begins a section of its own heading; `</section>` ends it.
pub fn section(out: &mut String, id: &str, title: &str) -> Result {
    writeln!(out, "<section aria-labelledby=\"h-{id}\">\n<h2 id=\"h-{id}\">{}</h2>", text(title))
}

/// A table's start up to its body, in a box that scrolls by itself; columns, which are HTML, hold numbers where their
/// name begins with `#`.
pub fn open_table(out: &mut String, class: &str, label: &str, caption: &str, columns: &[String]) -> Result {
    writeln!(
        out,
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{}\"><table class=\"{class}\">",
        text(label)
    )?;
    if !caption.is_empty() {
        writeln!(out, "<caption>{}</caption>", text(caption))?;
    }
    if !columns.is_empty() {
        out.push_str("<thead><tr>");
        for column in columns {
            match column.strip_prefix('#') {
                Some(name) => write!(out, "<th scope=\"col\" class=\"n\">{name}</th>")?,
                None => write!(out, "<th scope=\"col\">{column}</th>")?,
            }
        }
        out.push_str("</tr></thead>\n");
    }
    out.push_str("<tbody>\n");
    Ok(())
}

pub const TABLE_END: &str = "</tbody></table></div>\n";

/// A row of a table of facts.
pub fn fact_row(out: &mut String, name: &str, value: &str) -> Result {
    writeln!(out, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", text(name), text(value))
}

/// Escapes text for HTML, in elements and quoted attributes.
pub fn text(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    for c in raw.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A small PNG of a picture, its longest side `side` pixels at most, as a data URL; none of a picture without pixels.
pub fn thumbnail(picture: Rgb, side: u32) -> Option<String> {
    let Rgb { width, height, data } = picture;
    let picture = image::RgbImage::from_raw(width.try_into().ok()?, height.try_into().ok()?, data)?;
    let picture = image::DynamicImage::ImageRgb8(picture);
    // Never larger than it is.
    let small = if picture.width().max(picture.height()) > side { picture.thumbnail(side, side) } else { picture };
    let mut png = std::io::Cursor::new(Vec::new());
    small.write_to(&mut png, image::ImageFormat::Png).ok()?;
    let coded = base64::engine::general_purpose::STANDARD.encode(png.get_ref());
    Some(format!("data:image/png;base64,{coded}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(text("<b a=\"1\" c='2'>&"), "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;");
    }

    /// PNG's width stands at byte 16 of the file.
    #[test]
    fn thumbnails_are_no_larger_than_asked() {
        let side = |width, height| {
            let url = thumbnail(Rgb::black(width, height), 160).unwrap();
            let png = base64::engine::general_purpose::STANDARD.decode(url.split_once(',').unwrap().1).unwrap();
            let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
            (number(16), number(20))
        };
        assert_eq!(side(640, 320), (160, 80));
        assert_eq!(side(20, 30), (20, 30));
    }
}
