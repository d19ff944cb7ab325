//! Scripts that start a bundle, and its README.txt.
use std::fmt::Write;

/// What a bundle's program runs on: what this program runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    Linux,
    MacOs,
    Windows,
}

impl System {
    pub fn here() -> Self {
        match std::env::consts::OS {
            "windows" => System::Windows,
            "macos" => System::MacOs,
            _ => System::Linux,
        }
    }

    /// The file to double-click.
    fn start(self) -> &'static str {
        match self {
            System::Linux => "start.sh",
            System::MacOs => "start.command",
            System::Windows => "start.bat",
        }
    }
}

/// Licences of what every bundle holds.
pub const LICENSES: &str = concat!(
    "mbq-convert\n===========\n\n",
    include_str!("../../LICENSE"),
    "\nllama.cpp and ggml (runtime/)\n=============================\n\n",
    "Copyright (c) 2023-2026 The ggml authors, under the same terms (MIT licence).\n",
    "https://github.com/ggml-org/llama.cpp\n",
    "\nGCC's libraries, where lib/ or runtime/ has them (libstdc++, libgcc_s, libgomp)\n",
    "==========================================================================\n\n",
    "Copyright (c) Free Software Foundation, Inc. GNU General Public License, version 3, with the GCC Runtime Library\n",
    "Exception, version 3.1. They are unchanged copies from the system that made this bundle, whose distributor has\n",
    "their source; https://gcc.gnu.org has it, too.\n"
);

/// Writes scripts. Names are those of files in the bundle.
pub struct Launcher<'a> {
    pub program: &'a str,
    pub model: &'a str,
    pub mmproj: &'a str,
    /// The model's name, for people.
    pub name: &'a str,
}

impl Launcher<'_> {
    /// Names, texts, and whether they are run.
    pub fn scripts(&self, system: System) -> Vec<(String, String, bool)> {
        let script = |text: String| (system.start().to_string(), text, true);
        match system {
            System::Linux => vec![script(self.shell()), (format!("{}.desktop", self.name), self.desktop(), true)],
            System::MacOs => vec![script(self.shell())],
            System::Windows => vec![script(self.batch())],
        }
    }

    fn shell(&self) -> String {
        let quoted = |name: &str| name.replace('\'', "'\\''");
        let (program, model, mmproj) = (quoted(self.program), quoted(self.model), quoted(self.mmproj));
        format!(
            r#"#!/bin/sh
# Starts the server with this folder's model and opens its page in the browser. Ctrl+C ends it.
# Options of `mbq-convert serve` may follow: ./start.sh --port 9000
# It may be called by a link from elsewhere.
self=$0
while [ -L "$self" ]; do
    target=$(readlink -- "$self") || exit 1
    case $target in
        /*) self=$target ;;
        *) self=$(dirname -- "$self")/$target ;;
    esac
done
here=$(CDPATH= cd -- "$(dirname -- "$self")" && pwd) || exit 1
program=$here/'{program}'
# Copying may have lost the permission to run.
[ -x "$program" ] || chmod +x "$program" "$here"/runtime/* 2>/dev/null
# Where the C++ library is missing or too old, the one in lib/ is used. llama.cpp may ask for a newer one than the program.
if ! {{ "$program" --version && "$here"/runtime/llama-mtmd-cli --version; }} >/dev/null 2>&1; then
    LD_LIBRARY_PATH=$here/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
    export LD_LIBRARY_PATH
fi
exec "$program" serve "$here"/model/'{model}' --mmproj "$here"/model/'{mmproj}' --runtime "$here/runtime" "$@"
"#
        )
    }

    /// `%k` is where the file lies.
    fn desktop(&self) -> String {
        let name = self.name;
        format!(
            "[Desktop Entry]\nType=Application\nVersion=1.0\nName={name}\nComment=Ask {name} about pictures\n\
             Exec=sh -c \"exec \\\\\"\\\\$(dirname \\\\\"\\\\$1\\\\\")/start.sh\\\\\"\" sh %k\nTerminal=true\nCategories=Graphics;\n"
        )
    }

    fn batch(&self) -> String {
        let quoted = |name: &str| name.replace('%', "%%");
        let (program, model, mmproj) = (quoted(self.program), quoted(self.model), quoted(self.mmproj));
        [
            "@echo off".to_string(),
            "rem Starts the server with this folder's model and opens its page in the browser. Ctrl+C ends it.".into(),
            format!(
                "\"%~dp0{program}\" serve \"%~dp0model\\{model}\" --mmproj \"%~dp0model\\{mmproj}\" --runtime \"%~dp0runtime\" %*"
            ),
            "if errorlevel 1 pause".into(),
            String::new(),
        ]
        .join("\r\n")
    }
}

/// What is told about a bundle.
pub struct Guide {
    pub system: System,
    /// Of the model.
    pub name: String,
    /// Repository of the checkpoint.
    pub base: Option<String>,
    pub license: Option<String>,
    /// The runtime has code for every generation of processors.
    pub portable: bool,
    /// The oldest glibc that will do is 2.N.
    pub glibc: Option<u32>,
    /// Libraries of the system that are carried, and others that are needed and are not.
    pub carried: Vec<String>,
    pub missing: Vec<String>,
}

impl Guide {
    /// What whoever makes the bundle should know.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.portable {
            notes.push(format!(
                "{} A program built with MBQ_PORTABLE=1 makes bundles for any processor of the architecture.",
                self.processor()
            ));
        }
        if !self.missing.is_empty() {
            notes.push(format!("not carried, and needed where the bundle runs: {}", self.missing.join(", ")));
        }
        if self.license.is_none() {
            notes.push("the model's file names no licence: find out before you pass the bundle on".into());
        }
        notes
    }

    fn processor(&self) -> String {
        let arch = std::env::consts::ARCH;
        if self.portable {
            return format!("Its code fits any {arch} processor and is chosen when it starts.");
        }
        format!(
            "The runtime inside is not portable: it was built for the processor of the machine that built it, and may end with \
             \"Illegal instruction\" on an older or other {arch} processor."
        )
    }

    /// README.txt, of a bundle with the files of `listing`.
    pub fn text(&self, listing: &[(String, u64)]) -> String {
        let mut out = String::new();
        self.write(&mut out, listing).unwrap_or_default();
        let lines: Vec<String> = out.lines().map(|line| wrapped(line, 78)).collect();
        let end = if self.system == System::Windows { "\r\n" } else { "\n" };
        lines.join("\n").replace('\n', end) + end
    }

    fn write(&self, out: &mut String, listing: &[(String, u64)]) -> std::fmt::Result {
        let (name, start) = (&self.name, self.system.start());
        writeln!(out, "{name}\n{}\n", "=".repeat(name.chars().count()))?;
        writeln!(
            out,
            "A model that answers questions about pictures, and all that runs it. Nothing has to be installed, and nothing is sent to other machines.\n"
        )?;
        writeln!(out, "Start\n-----\n")?;
        match self.system {
            System::Linux => {
                writeln!(
                    out,
                    "Double-click {name}.desktop or {start} (a file manager may ask: choose Run, or allow launching), or run ./{start} in a terminal."
                )?;
            }
            System::MacOs => {
                writeln!(
                    out,
                    "Double-click {start}. The program is not signed: the first time, open it with a right click, or run `xattr -dr com.apple.quarantine .` in this folder."
                )?;
            }
            System::Windows => writeln!(out, "Double-click {start}.")?,
        }
        writeln!(
            out,
            "The browser opens a page; if it does not, open the address that the terminal shows, http://127.0.0.1:8080 for instance. Drop a picture on the page and ask. Programs that speak OpenAI's protocol use the same address with /v1. Ctrl+C in the terminal ends it.\n"
        )?;
        writeln!(out, "Needs\n-----\n")?;
        writeln!(out, "{}", self.processor())?;
        if self.system == System::Linux {
            let glibc = self.glibc.map_or(String::new(), |n| format!(" with glibc 2.{n} or newer"));
            writeln!(out, "Linux{glibc}.")?;
        }
        if !self.missing.is_empty() {
            writeln!(out, "These libraries are not in here and must be installed: {}.", self.missing.join(", "))?;
        }
        writeln!(out, "\nLicences\n--------\n")?;
        let base = self.base.as_ref().map_or(String::new(), |base| format!(", made from {base}"));
        match &self.license {
            Some(license) => writeln!(out, "The model ({name}{base}): {license}.")?,
            None => writeln!(
                out,
                "The model ({name}{base}): its file names no licence. Ask who made it before you pass it on."
            )?,
        }
        writeln!(out, "mbq-convert and llama.cpp: MIT licence, in LICENSE.txt.")?;
        if !self.carried.is_empty() {
            writeln!(out, "{}: GPL with GCC's runtime library exception (LICENSE.txt).", self.carried.join(", "))?;
        }
        writeln!(out, "\nFiles\n-----\n")?;
        for (name, bytes) in listing {
            writeln!(out, "{:>10.1} MB  {name}", *bytes as f64 / 1e6)?;
        }
        Ok(())
    }
}

/// A line broken at spaces; one that begins with a space stays as it is.
fn wrapped(line: &str, width: usize) -> String {
    if line.starts_with(' ') {
        return line.into();
    }
    let mut out = String::new();
    let mut column = 0;
    for word in line.split(' ') {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > width {
            out.push('\n');
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAUNCHER: Launcher =
        Launcher { program: "mbq-convert", model: "100%'s.gguf", mmproj: "mmproj.gguf", name: "100%'s" };

    #[test]
    fn every_system_has_a_script() {
        let names = |system| LAUNCHER.scripts(system).into_iter().map(|(name, ..)| name).collect::<Vec<_>>();
        assert_eq!(names(System::Linux), ["start.sh", "100%'s.desktop"]);
        assert_eq!(names(System::MacOs), ["start.command"]);
        assert_eq!(names(System::Windows), ["start.bat"]);
        let batch = LAUNCHER.batch();
        assert!(batch.contains("\"%~dp0model\\100%%'s.gguf\"") && batch.ends_with("pause\r\n"), "{batch}");
        assert!(!batch.replace("\r\n", "").contains('\n'));
        assert!(LAUNCHER.shell().contains("/model/'100%'\\''s.gguf'"));
    }

    #[test]
    fn lines_break_at_spaces_and_lists_do_not() {
        assert_eq!(wrapped("one two three", 7), "one two\nthree");
        assert_eq!(wrapped("incomprehensibilities", 7), "incomprehensibilities");
        assert_eq!(wrapped("   1.0 MB  a b c", 7), "   1.0 MB  a b c");
    }
}
