//! Refusals, in the words and the shape of the real API server: a `Status` object with reason and code.

use serde_json::{Map, Value, json};

/// A refusal that goes out as a `Status` object (or, for unknown top-level paths, as plain text).
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) code: u16,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) details: Option<Value>,
    pub(crate) retry_after: Option<u32>,
    pub(crate) plain: bool,
}

/// One finding of validation, as the real server's `field.Error`.
#[derive(Debug, Clone)]
pub(crate) struct FieldError {
    kind: &'static str,
    reason: &'static str,
    field: String,
    value: Option<String>,
    detail: String,
}

impl FieldError {
    pub(crate) fn invalid(field: impl Into<String>, value: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind: "Invalid value",
            reason: "FieldValueInvalid",
            field: field.into(),
            value: Some(value.into()),
            detail: detail.into(),
        }
    }

    pub(crate) fn required(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind: "Required value",
            reason: "FieldValueRequired",
            field: field.into(),
            value: None,
            detail: detail.into(),
        }
    }

    pub(crate) fn forbidden(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind: "Forbidden",
            reason: "FieldValueForbidden",
            field: field.into(),
            value: None,
            detail: detail.into(),
        }
    }

    pub(crate) fn too_long(field: impl Into<String>, max: usize) -> Self {
        Self {
            kind: "Too long",
            reason: "FieldValueTooLong",
            field: field.into(),
            value: None,
            detail: format!("may not be more than {max} bytes"),
        }
    }

    /// Everything after the field's name.
    fn body(&self) -> String {
        let mut text = self.kind.to_owned();
        if let Some(value) = &self.value {
            text = format!("{text}: {value:?}");
        }
        if !self.detail.is_empty() {
            text.push_str(": ");
            text.push_str(&self.detail);
        }
        text
    }
}

/// Group and plural name, as errors spell them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupResource<'a> {
    pub(crate) group: &'a str,
    pub(crate) resource: &'a str,
}

impl GroupResource<'_> {
    fn qualified(self) -> String {
        if self.group.is_empty() { self.resource.to_owned() } else { format!("{}.{}", self.resource, self.group) }
    }

    fn details(self, name: &str) -> Map<String, Value> {
        let mut map = Map::new();
        if !name.is_empty() {
            map.insert("name".into(), name.into());
        }
        if !self.group.is_empty() {
            map.insert("group".into(), self.group.into());
        }
        map.insert("kind".into(), self.resource.into());
        map
    }
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None, retry_after: None, plain: false }
    }

    fn with(mut self, details: Map<String, Value>) -> Self {
        self.details = Some(Value::Object(details));
        self
    }

    pub(crate) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub(crate) fn forbidden(gr: GroupResource<'_>, name: &str, why: &str) -> Self {
        let message = match (gr.resource.is_empty(), name.is_empty()) {
            (true, _) => format!("forbidden: {why}"),
            (false, true) => format!("{} is forbidden: {why}", gr.qualified()),
            (false, false) => format!("{} \"{name}\" is forbidden: {why}", gr.qualified()),
        };
        let mut details = gr.details(name);
        if gr.resource.is_empty() {
            details.clear();
        }
        Self::new(403, "Forbidden", message).with(details)
    }

    pub(crate) fn not_found(gr: GroupResource<'_>, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} \"{name}\" not found", gr.qualified())).with(gr.details(name))
    }

    /// A resource that a known group version does not have.
    pub(crate) fn no_such_resource() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource").with(Map::new())
    }

    /// A path outside every known group version: the real server answers in plain text.
    pub(crate) fn no_such_path() -> Self {
        Self { plain: true, ..Self::new(404, "NotFound", "404 page not found\n") }
    }

    pub(crate) fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
            .with(Map::new())
    }

    pub(crate) fn not_acceptable(message: impl Into<String>) -> Self {
        Self::new(406, "NotAcceptable", message)
    }

    pub(crate) fn already_exists(gr: GroupResource<'_>, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{} \"{name}\" already exists", gr.qualified())).with(gr.details(name))
    }

    pub(crate) fn conflict(gr: GroupResource<'_>, name: &str, why: &str) -> Self {
        Self::new(409, "Conflict", format!("Operation cannot be fulfilled on {} \"{name}\": {why}", gr.qualified()))
            .with(gr.details(name))
    }

    pub(crate) fn modified(gr: GroupResource<'_>, name: &str) -> Self {
        Self::conflict(
            gr,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// Server-side apply met fields of other managers: (manager in words, field path).
    pub(crate) fn apply_conflict(conflicts: &[(String, String)]) -> Self {
        let message = if let [(who, field)] = conflicts {
            format!("Apply failed with 1 conflict: conflict with {who}: {field}")
        } else {
            let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
            for (who, field) in conflicts {
                match groups.iter_mut().find(|(name, _)| name == who) {
                    Some((_, fields)) => fields.push(field),
                    None => groups.push((who, vec![field])),
                }
            }
            groups.sort();
            let lines: Vec<String> = groups
                .iter()
                .map(|(who, fields)| format!("conflicts with {who}:\n- {}", fields.join("\n- ")))
                .collect();
            format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
        };
        let causes: Vec<Value> = conflicts
            .iter()
            .map(|(who, field)| {
                json!({"reason": "FieldManagerConflict", "message": format!("conflict with {who}"), "field": field})
            })
            .collect();
        let mut details = Map::new();
        details.insert("causes".into(), Value::Array(causes));
        Self::new(409, "Conflict", message).with(details)
    }

    pub(crate) fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    pub(crate) fn too_large(message: impl std::fmt::Display) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity too large: {message}"))
    }

    pub(crate) fn unsupported_media_type(accepted: &[&str]) -> Self {
        Self::new(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format - accepted media types include: {}",
                accepted.join(", ")
            ),
        )
    }

    pub(crate) fn invalid(kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let texts: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.field, e.body())).collect();
        let list = if let [one] = texts.as_slice() { one.clone() } else { format!("[{}]", texts.join(", ")) };
        let mut details = Map::new();
        if !name.is_empty() {
            details.insert("name".into(), name.into());
        }
        if !kind.is_empty() {
            details.insert("kind".into(), kind.into());
        }
        details.insert(
            "causes".into(),
            errors.iter().map(|e| json!({"reason": e.reason, "message": e.body(), "field": e.field})).collect(),
        );
        Self::new(422, "Invalid", format!("{kind} \"{name}\" is invalid: {list}")).with(details)
    }

    /// What a JSON Patch gets whose `test` fails or whose path is not there. The real server says no more.
    pub(crate) fn unprocessable() -> Self {
        Self::new(422, "Invalid", "the server rejected our request due to an error in our request").with(Map::new())
    }

    pub(crate) fn too_many_requests(message: impl Into<String>, retry_after: Option<u32>, causes: Vec<Value>) -> Self {
        let mut details = Map::new();
        if !causes.is_empty() {
            details.insert("causes".into(), Value::Array(causes));
        }
        if let Some(seconds) = retry_after {
            details.insert("retryAfterSeconds".into(), seconds.into());
        }
        Self { retry_after, ..Self::new(429, "TooManyRequests", message).with(details) }
    }

    pub(crate) fn internal(message: &str) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {message}"))
    }

    /// An error without a reason, such as creating an object that carries a resourceVersion.
    pub(crate) fn unknown(message: &str) -> Self {
        Self::new(500, "", message)
    }

    pub(crate) fn version_too_large(asked: u64, current: u64) -> Self {
        let details = json!({
            "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
            "retryAfterSeconds": 1,
        });
        Self {
            details: Some(details),
            retry_after: Some(1),
            ..Self::new(504, "Timeout", format!("Timeout: Too large resource version: {asked}, current: {current}"))
        }
    }

    /// The usual Status for a code, for injected faults.
    pub(crate) fn of_code(code: u16, retry_after: Option<u32>) -> Self {
        let error = match code {
            401 => Self::unauthorized(),
            403 => Self::new(403, "Forbidden", "forbidden: injected fault"),
            404 => Self::no_such_resource(),
            409 => Self::new(
                409,
                "Conflict",
                "Operation cannot be fulfilled: the object has been modified; please apply your changes to the \
                 latest version and try again",
            ),
            410 => Self::expired("The provided resourceVersion is too old"),
            422 => Self::unprocessable(),
            // Priority and fairness, or the limit of requests in flight: plain text, and the time in the header alone.
            429 => {
                let text = "Too many requests, please try again later.\n";
                Self { plain: true, ..Self::new(429, "TooManyRequests", text) }
            }
            500 => Self::internal("injected fault"),
            503 => Self::new(503, "ServiceUnavailable", "the server is currently unable to handle the request"),
            504 => Self::new(504, "Timeout", "Timeout: request did not complete within the allotted timeout"),
            other => Self::new(other, "", "injected fault"),
        };
        Self { retry_after, ..error }
    }

    /// The `Status` object.
    pub(crate) fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "code": self.code,
        });
        if !self.reason.is_empty() {
            status["reason"] = self.reason.into();
        }
        if let Some(details) = &self.details {
            status["details"] = details.clone();
        }
        status
    }
}
