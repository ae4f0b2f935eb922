//! Label and field selectors, with the real server's grammar.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::status::ApiError;
use super::validate;

/// A parsed label selector; an empty one matches everything.
#[derive(Debug, Clone, Default)]
pub(crate) struct LabelSelector(Vec<Requirement>);

#[derive(Debug, Clone)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

fn refuse(detail: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("unable to parse requirement: {detail}"))
}

/// Splits at commas that are outside parentheses.
fn split_top(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_i32, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

impl LabelSelector {
    pub(crate) fn parse(text: &str) -> Result<Self, ApiError> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        split_top(text).into_iter().map(Requirement::parse).collect::<Result<Vec<_>, _>>().map(Self)
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        let empty = Map::new();
        let labels = object["metadata"]["labels"].as_object().unwrap_or(&empty);
        self.0.iter().all(|requirement| requirement.matches(labels))
    }
}

impl Requirement {
    fn parse(text: &str) -> Result<Self, ApiError> {
        let text = text.trim();
        let (negated, rest) = match text.strip_prefix('!') {
            Some(rest) => (true, rest.trim_start()),
            None => (false, text),
        };
        let end = rest.find(|c: char| c.is_whitespace() || "=!<>(),".contains(c)).unwrap_or(rest.len());
        let (key, rest) = (&rest[..end], rest[end..].trim());
        if let Some(fault) = validate::label_key_fault(key) {
            return Err(refuse(format!("key: Invalid value: {key:?}: {fault}")));
        }
        let make = |test| Ok(Self { key: key.to_owned(), test });
        if negated {
            return if rest.is_empty() { make(Test::Absent) } else { Err(refuse(format!("found '{rest}'"))) };
        }
        if rest.is_empty() {
            return make(Test::Exists);
        }
        let one = |value: &str| -> Result<BTreeSet<String>, ApiError> {
            let value = value.trim();
            match validate::label_value_fault(value) {
                Some(fault) => Err(refuse(format!("values[0][{key}]: Invalid value: {value:?}: {fault}"))),
                None => Ok(BTreeSet::from([value.to_owned()])),
            }
        };
        let number = |value: &str| {
            value.trim().parse::<i64>().map_err(|_| {
                refuse(format!(
                    "values[0][{key}]: Invalid value: {value:?}: for 'Gt', 'Lt' operators, the value must be an integer"
                ))
            })
        };
        if let Some(value) = rest.strip_prefix("!=") {
            return make(Test::NotIn(one(value)?));
        }
        if let Some(value) = rest.strip_prefix("==").or_else(|| rest.strip_prefix('=')) {
            return make(Test::In(one(value)?));
        }
        if let Some(value) = rest.strip_prefix('>') {
            return make(Test::Greater(number(value)?));
        }
        if let Some(value) = rest.strip_prefix('<') {
            return make(Test::Less(number(value)?));
        }
        let (wanted, list) = if let Some(list) = rest.strip_prefix("notin") {
            (false, list)
        } else if let Some(list) = rest.strip_prefix("in") {
            (true, list)
        } else {
            return Err(refuse(format!("found '{rest}', expected: in, notin, =, ==, !=, gt, lt")));
        };
        let inner = list
            .trim()
            .strip_prefix('(')
            .and_then(|l| l.strip_suffix(')'))
            .ok_or_else(|| refuse(format!("found '{}', expected: '('", list.trim())))?;
        let mut values = BTreeSet::new();
        for value in inner.split(',') {
            values.append(&mut one(value)?);
        }
        make(if wanted { Test::In(values) } else { Test::NotIn(values) })
    }

    fn matches(&self, labels: &Map<String, Value>) -> bool {
        let value = labels.get(&self.key).and_then(Value::as_str);
        match &self.test {
            Test::In(set) => value.is_some_and(|v| set.contains(v)),
            Test::NotIn(set) => value.is_none_or(|v| !set.contains(v)),
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
            Test::Greater(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
            Test::Less(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
        }
    }
}

/// A parsed field selector; which fields exist depends on the resource.
#[derive(Debug, Clone, Default)]
pub(crate) struct FieldSelector(Vec<(String, bool, String)>);

impl FieldSelector {
    /// Syntax only; [`FieldSelector::check`] knows the fields.
    pub(crate) fn parse(text: &str) -> Result<Self, ApiError> {
        let mut terms = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, equal, value) = if let Some((key, value)) = part.split_once("!=") {
                (key, false, value)
            } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (key, true, value)
            } else {
                return Err(ApiError::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'")));
            };
            terms.push((key.trim().to_owned(), equal, value.trim().to_owned()));
        }
        Ok(Self(terms))
    }

    pub(crate) fn check(&self, known: &[&str]) -> Result<(), ApiError> {
        match self.0.iter().find(|(key, ..)| !known.contains(&key.as_str())) {
            Some((key, ..)) => Err(ApiError::bad_request(format!("field label not supported: {key}"))),
            None => Ok(()),
        }
    }

    /// The value that the selector demands of a field, if it names exactly one.
    pub(crate) fn exact(&self, field: &str) -> Option<&str> {
        self.0.iter().find(|(key, equal, _)| key == field && *equal).map(|(.., value)| value.as_str())
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(key, equal, wanted)| (field_text(object, key) == *wanted) == *equal)
    }
}

/// A field by its dotted path, as text; what is absent reads as the Go zero value, as in the real server.
fn field_text(object: &Value, path: &str) -> String {
    let mut at = object;
    for step in path.split('.') {
        at = &at[step];
    }
    // The core event's `source` selects by the component's name.
    if path == "source" {
        at = &object["source"]["component"];
    }
    match at {
        Value::String(text) => text.clone(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        _ if path == "spec.unschedulable" || path == "spec.hostNetwork" => "false".to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors_match_as_the_server_does() {
        let object = json!({"metadata": {"labels": {"a": "1", "nvidia.com/cc.mode": "on", "empty": ""}}});
        for (selector, expected) in [
            ("", true),
            ("a", true),
            ("!a", false),
            ("!b", true),
            ("a=1", true),
            ("a==1,nvidia.com/cc.mode=on", true),
            ("a!=1", false),
            ("b!=1", true),
            ("a in (1, 2)", true),
            ("a in (2,3)", false),
            ("a notin (2,3)", true),
            ("b notin (2,3)", true),
            ("empty=", true),
            ("a>0", true),
            ("a<1", false),
            ("b>0", false),
        ] {
            let parsed = LabelSelector::parse(selector).unwrap_or_else(|e| panic!("{selector}: {e:?}"));
            assert_eq!(parsed.matches(&object), expected, "{selector}");
        }
    }

    #[test]
    fn malformed_selectors_are_refused() {
        for selector in ["a in 1", "a in (1", "=1", "a=b c", "a,,b", "a ~ b", "a>x", "-a=1", "!a=1"] {
            assert_eq!(LabelSelector::parse(selector).expect_err(selector).code, 400, "{selector}");
        }
        assert_eq!(FieldSelector::parse("metadata.name").expect_err("no operator").code, 400);
        let unknown = FieldSelector::parse("spec.foo=1").expect("syntax is right");
        assert_eq!(
            unknown.check(&["metadata.name"]).expect_err("unknown field").message,
            "field label not supported: spec.foo"
        );
    }

    #[test]
    fn field_selectors_read_absent_fields_as_zero() {
        let object = json!({"metadata": {"name": "n"}, "spec": {}});
        for (selector, expected) in [
            ("metadata.name=n", true),
            ("metadata.name!=n", false),
            ("spec.nodeName=", true),
            ("spec.nodeName!=x", true),
            ("spec.unschedulable=false", true),
        ] {
            assert_eq!(FieldSelector::parse(selector).expect(selector).matches(&object), expected, "{selector}");
        }
    }
}
