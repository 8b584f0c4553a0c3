//! Standard output: text for people, JSON for programs.

use std::io::{self, BufWriter, StdoutLock, Write as _};

use serde_json::Value;

/// Standard output, locked and buffered.
#[derive(Debug)]
pub(crate) struct Output {
    stdout: BufWriter<StdoutLock<'static>>,
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { stdout: BufWriter::new(io::stdout().lock()), json }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// One object, on one line.
    pub(crate) fn json(&mut self, value: &Value) -> io::Result<()> {
        writeln!(self.stdout, "{value}")
    }

    pub(crate) fn line(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.stdout, "{line}")
    }

    pub(crate) fn text(&mut self, text: &str) -> io::Result<()> {
        self.stdout.write_all(text.as_bytes())
    }

    /// Bytes and a line end.
    pub(crate) fn raw(&mut self, start: &str, bytes: &[u8]) -> io::Result<()> {
        self.stdout.write_all(start.as_bytes())?;
        self.stdout.write_all(bytes)?;
        self.stdout.write_all(b"\n")
    }

    /// A thing, in JSON or as lines of a label and a value.
    pub(crate) fn fields(&mut self, value: &Value, fields: &[(&str, String)]) -> io::Result<()> {
        if self.json {
            return self.json(value);
        }
        let width = fields.iter().map(|(label, _)| label.len()).max().unwrap_or_default();
        for (label, value) in fields {
            writeln!(self.stdout, "{label:width$}  {value}")?;
        }
        Ok(())
    }

    /// Rows under headings, each column as wide as its widest cell.
    pub(crate) fn table<const N: usize>(
        &mut self,
        headings: [&str; N],
        rows: &[[String; N]],
    ) -> io::Result<()> {
        let mut widths = headings.map(str::len);
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        self.row(&widths, headings.iter().copied())?;
        for row in rows {
            self.row(&widths, row.iter().map(String::as_str))?;
        }
        Ok(())
    }

    fn row<'a>(
        &mut self,
        widths: &[usize],
        cells: impl Iterator<Item = &'a str>,
    ) -> io::Result<()> {
        let cells = widths.iter().zip(cells);
        let line: String = cells.map(|(width, cell)| format!("{cell:width$}  ")).collect();
        writeln!(self.stdout, "{}", line.trim_end())
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}
