//! A page in Markdown: its fenced blocks, links, headings and words.

use std::fs;
use std::path::Path;

/// A page, by its path relative to the root.
pub(super) struct Page {
    pub(super) name: String,
    pub(super) text: String,
}

/// A fenced block, and the comment in the line before it.
pub(super) struct Block {
    pub(super) line: usize,
    pub(super) language: String,
    pub(super) text: String,
    /// Content of `<!-- … -->`.
    pub(super) comment: String,
}

impl Page {
    pub(super) fn read(root: &Path, path: &Path) -> Self {
        let text =
            fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.strip_prefix(root).unwrap_or(path).display().to_string();
        Self { name, text }
    }

    pub(super) fn blocks(&self) -> Vec<Block> {
        let (mut blocks, mut open, mut comment) = (Vec::new(), None::<Block>, String::new());
        for (index, line) in self.text.lines().enumerate() {
            if let Some(mut block) = open.take() {
                if line == "```" {
                    blocks.push(block);
                } else {
                    block.text.push_str(line);
                    block.text.push('\n');
                    open = Some(block);
                }
            } else if let Some(language) = line.strip_prefix("```") {
                let (language, comment) = (language.to_owned(), std::mem::take(&mut comment));
                open = Some(Block { line: index + 1, language, text: String::new(), comment });
            } else {
                let inner = line.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->"));
                comment = inner.unwrap_or_default().to_owned();
            }
        }
        assert!(open.is_none(), "{}: a block is not closed", self.name);
        blocks
    }

    /// Lines outside of fenced blocks.
    fn prose(&self) -> impl Iterator<Item = &str> {
        let mut fenced = false;
        self.text.lines().filter(move |line| {
            let is_fence = line.starts_with("```");
            fenced ^= is_fence;
            !is_fence && !fenced
        })
    }

    /// Targets of relative links and images.
    pub(super) fn links(&self) -> Vec<String> {
        let lines = self.prose().map(without_code);
        let targets = lines.flat_map(|line| {
            let rest: Vec<String> = line.split("](").skip(1).map(str::to_owned).collect();
            rest.into_iter().filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()))
        });
        targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:")).collect()
    }

    /// Anchors of headings, as GitHub makes them.
    pub(super) fn anchors(&self) -> Vec<String> {
        let mut anchors: Vec<String> = Vec::new();
        for line in self.prose().filter(|line| line.starts_with('#')) {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept =
                title.chars().filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
            let count = anchors.iter().filter(|known| **known == anchor).count();
            anchors.push(if count == 0 { anchor } else { format!("{anchor}-{count}") });
        }
        anchors
    }

    /// Number of words outside of blocks, tables and comments.
    pub(super) fn words(&self) -> usize {
        let lines = self.prose().filter(|line| !line.starts_with('|') && !line.starts_with("<!--"));
        lines.flat_map(str::split_whitespace).count()
    }
}

/// A line without what stands between backticks.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect()
}
