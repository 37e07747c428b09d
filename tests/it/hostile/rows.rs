//! Reads the rows of `tests/hostile/`.

use std::fs;
use std::path::Path;

use crate::hostile::upstream::Message;

/// One exchange.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    /// File and line.
    pub(super) location: String,
    pub(super) name: String,
    /// Bytes that the hostile side sends.
    pub(super) sent: Vec<u8>,
    /// For a hostile response: its request, if that is not a plain GET.
    pub(super) request: Option<Vec<u8>>,
    pub(super) client: Vec<Expected>,
    pub(super) upstream: Vec<Expected>,
    pub(super) end: End,
}

/// The expected end of the client's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum End {
    #[default]
    Close,
    Open,
}

/// The expected properties of one message.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    /// Status, or method and target.
    start: String,
    headers: Vec<(String, String)>,
    absent: Vec<String>,
    body: Option<Vec<u8>>,
    /// The message is aborted inside its body.
    broken: bool,
    /// At most a part of the message arrives, perhaps nothing.
    pub(super) partial: bool,
}

impl Expected {
    /// Returns the first property that `got` lacks.
    pub(super) fn difference(&self, got: &Message) -> Option<String> {
        if self.start != got.short_start() {
            return Some(format!("{:?}, not {:?}", got.short_start(), self.start));
        }
        let has = |(name, value): &&(String, String)| {
            !got.headers.iter().any(|(n, v)| n == name && v == value)
        };
        if let Some((name, value)) = self.headers.iter().find(has) {
            return Some(format!("no {name}: {value}"));
        }
        if let Some(name) =
            self.absent.iter().find(|name| got.headers.iter().any(|(n, _)| n == *name))
        {
            return Some(format!("{name} is there"));
        }
        if self.broken == got.whole {
            return Some(format!("whole: {}", got.whole));
        }
        // An error response needs a text. Rows check the text itself where it matters.
        if matches!(got.status(), 400..600) && got.body.is_empty() && got.expects_body {
            return Some("an error without a body".to_owned());
        }
        let body = self.body.as_ref()?;
        (*body != got.body).then(|| format!("body {:?}", String::from_utf8_lossy(&got.body)))
    }
}

/// All rows of `tests/hostile/FOLDER/`, in the order of the files.
pub(super) fn read_rows(folder: &str) -> Vec<Row> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile").join(folder);
    let mut files: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().flat_map(|file| read_file(file)).collect()
}

fn read_file(path: &Path) -> Vec<Row> {
    let file = path.file_name().unwrap().to_string_lossy();
    let text = fs::read_to_string(path).unwrap();
    let (mut rows, mut block, mut start) = (Vec::new(), Vec::new(), 0);
    for (number, line) in text.lines().chain([""]).enumerate() {
        if line.starts_with('#') {
            continue;
        }
        if !line.is_empty() {
            if block.is_empty() {
                start = number + 1;
            }
            block.push(line);
            continue;
        }
        if !block.is_empty() {
            rows.extend(variants(&format!("{file}:{start}"), &block));
            block.clear();
        }
    }
    rows
}

/// The rows of a block: one for each value of its `for` line.
fn variants(location: &str, block: &[&str]) -> Vec<Row> {
    let Some(values) = block.iter().find_map(|line| line.strip_prefix("for X: ")) else {
        return vec![row(location, block)];
    };
    let lines: Vec<&str> =
        block.iter().copied().filter(|line| !line.starts_with("for X: ")).collect();
    values
        .split(" | ")
        .map(|value| {
            let lines: Vec<String> = lines.iter().map(|line| line.replace("{X}", value)).collect();
            let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
            row(location, &lines)
        })
        .collect()
}

fn row(location: &str, lines: &[&str]) -> Row {
    let mut row =
        Row { location: location.to_owned(), name: lines[0].to_owned(), ..Row::default() };
    for line in &lines[1..] {
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (kind, rest) {
            (">", bytes) => row.sent.extend(unescape(bytes)),
            ("?", bytes) => row.request.get_or_insert_default().extend(unescape(bytes)),
            ("<", "open") => row.end = End::Open,
            ("<", "close") => row.end = End::Close,
            ("<", rest) => expect(&mut row.client, rest),
            ("=", "none") => {}
            ("=", rest) => expect(&mut row.upstream, rest),
            _ => panic!("{location}: {line:?}"),
        }
    }
    assert!(!row.sent.is_empty(), "{location} sends nothing");
    row
}

/// Applies a line to the last expected message, or starts another one.
fn expect(messages: &mut Vec<Expected>, line: &str) {
    let header = line.split_once(": ").filter(|(name, _)| !name.contains([' ', '/']));
    let last = messages.last_mut();
    match (line.strip_prefix('!'), header, last) {
        (Some(name), _, Some(last)) => last.absent.push(name.to_ascii_lowercase()),
        (None, Some(("body", value)), Some(last)) => last.body = Some(unescape(value)),
        (None, Some((name, value)), Some(last)) => {
            let value = String::from_utf8_lossy(&unescape(value)).into_owned();
            last.headers.push((name.to_ascii_lowercase(), value));
        }
        (None, None, Some(last)) if line == "broken" => last.broken = true,
        (None, None, Some(last)) if line == "body:" => last.body = Some(Vec::new()),
        _ => {
            let (partial, line) = match line.strip_prefix("part ") {
                Some(line) => (true, line),
                None => (false, line),
            };
            let start = String::from_utf8_lossy(&unescape(line)).into_owned();
            messages.push(Expected { start, partial, broken: partial, ..Expected::default() });
        }
    }
}

/// Decodes escapes of bytes (`\r`, `\n`, `\t`, `\\`, `\xNN`) and repetitions: `{100*text}`.
fn unescape(line: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        if first == '{'
            && let Some((inside, behind)) = rest[1..].split_once('}')
            && let Some((count, text)) = inside.split_once('*')
            && let Ok(count) = count.parse::<usize>()
        {
            bytes.extend(unescape(text).repeat(count));
            rest = behind;
        } else if first == '\\' {
            let (byte, length) = match rest.as_bytes()[1] {
                b'r' => (b'\r', 2),
                b'n' => (b'\n', 2),
                b't' => (b'\t', 2),
                b'\\' => (b'\\', 2),
                b'x' => (u8::from_str_radix(&rest[2..4], 16).unwrap(), 4),
                other => panic!("\\{} in {line:?}", char::from(other)),
            };
            bytes.push(byte);
            rest = &rest[length..];
        } else {
            let mut utf8 = [0; 4];
            bytes.extend_from_slice(first.encode_utf8(&mut utf8).as_bytes());
            rest = &rest[first.len_utf8()..];
        }
    }
    bytes
}
