//! Columns for a terminal.

/// Lines of left-aligned columns, two spaces apart, without blanks at their ends. Control characters, which a file of a
/// strange tree could hold, are shown as `?`.
pub(crate) fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let clean = |cell: &String| cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect::<String>();
    let rows: Vec<[String; N]> = rows.iter().map(|row| row.each_ref().map(clean)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["a", "bb", "c"], ["aaa", "é", ""], ["\u{1b}[1m", "b", "c"]].map(|row| row.map(str::to_owned));
        assert_eq!(align(&rows), "a     bb  c\naaa   é\n?[1m  b   c\n");
    }
}
