//! HTTP: from a request to an answer, with the real server's order of checks and its manners.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use serde_json::{Map, Value, json};

use super::auth::User;
use super::faults::FaultAction;
use super::ops::{DeleteOptions, Deleted, Target, Writing};
use super::patch::PatchKind;
use super::resources::{Query, RequestInfo, ResourceType, discovery, partial};
use super::selector::{FieldSelector, LabelSelector};
use super::status::{ApiError, FieldError};
use super::store::{Key, RequestRecord, State};
use super::watch::{Scope, WatchRequest, Watcher};
use super::{Counted, Shared};

/// The real server's limit of a request body.
const BODY_LIMIT: usize = 3 * 1024 * 1024;
/// How long a client may take to send its body.
const BODY_DEADLINE: Duration = Duration::from_mins(1);
/// How long a watch lasts that names no timeout.
const WATCH_DEFAULT: Duration = Duration::from_mins(30);

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// An answer before it is bytes.
enum Answer {
    Json(u16, Value),
    Text(u16, &'static str),
    Watch(Box<Watcher>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Whole,
    Partial,
    PartialList,
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Where and how one request stands.
struct Exchange {
    shared: Arc<Shared>,
    info: RequestInfo,
    query: Query,
    headers: HeaderMap,
    method: Method,
    user: Arc<User>,
    body: Bytes,
}

fn text_header(headers: &HeaderMap, name: header::HeaderName) -> String {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).unwrap_or_default()
}

fn authenticate(shared: &Shared, headers: &HeaderMap) -> Result<Arc<User>, ApiError> {
    let value = text_header(headers, header::AUTHORIZATION);
    if value.is_empty() {
        return Ok(Arc::new(User::anonymous()));
    }
    let token = match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        _ => return Ok(Arc::new(User::anonymous())),
    };
    match shared.lock().tokens.get(token) {
        Some(known) if !known.expired => Ok(Arc::clone(&known.user)),
        _ => Err(ApiError::unauthorized()),
    }
}

/// One request. An error cuts the connection.
pub(crate) async fn handle(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, io::Error> {
    let (parts, incoming) = request.into_parts();
    let query = Query::parse(parts.uri.query().unwrap_or_default());
    let info = RequestInfo::parse(&parts.method, parts.uri.path(), &query);
    let user = authenticate(&shared, &parts.headers);
    let user_name = user.as_ref().map_or_else(|_| String::new(), |user| user.name.clone());
    let mut record = RequestRecord {
        time: SystemTime::now(),
        user: user_name.clone(),
        user_agent: text_header(&parts.headers, header::USER_AGENT),
        method: parts.method.as_str().to_owned(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        verb: info.verb.clone(),
        group: info.group.clone(),
        resource: info.full_resource(),
        namespace: info.namespace.clone(),
        name: info.name.clone(),
        accept: text_header(&parts.headers, header::ACCEPT),
        content_type: text_header(&parts.headers, header::CONTENT_TYPE),
        code: 0,
        body: Value::Null,
    };
    let fault = shared.lock().faults.take(&info, &user_name);
    let cut = || io::Error::new(io::ErrorKind::ConnectionAborted, "Connection cut by an injected fault");
    match &fault {
        Some(FaultAction::CutBefore) => {
            shared.record(record);
            return Err(cut());
        }
        Some(FaultAction::HoldBefore) => held(&shared).await,
        Some(FaultAction::Delay(pause)) => tokio::time::sleep(*pause).await,
        _ => {}
    }
    // A faulted write is recorded with its body, too.
    let body = read_body(incoming, &parts.method).await;
    if let Ok(bytes) = &body
        && !bytes.is_empty()
    {
        record.body = serde_json::from_slice(bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]).into_owned()));
    }
    match &fault {
        Some(FaultAction::Status { code, retry_after }) => {
            record.code = *code;
            shared.record(record);
            return Ok(refusal(&ApiError::of_code(*code, *retry_after)));
        }
        Some(FaultAction::Raw { code, content_type, body }) => {
            record.code = *code;
            shared.record(record);
            let mut response = Response::new(full(body.clone()));
            *response.status_mut() = StatusCode::from_u16(*code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            if let Ok(value) = content_type.parse() {
                response.headers_mut().insert(header::CONTENT_TYPE, value);
            }
            return Ok(response);
        }
        _ => {}
    }
    let result = match user {
        Err(error) => Err(error),
        Ok(user) => {
            let exchange = Exchange {
                shared: Arc::clone(&shared),
                info,
                query,
                headers: parts.headers,
                method: parts.method,
                user,
                body: Bytes::new(),
            };
            exchange.answer(body, fault.as_ref())
        }
    };
    shared.tell();
    match &fault {
        Some(FaultAction::CutAfterCommit) => {
            shared.record(record);
            return Err(cut());
        }
        Some(FaultAction::HoldAfterCommit) => held(&shared).await,
        _ => {}
    }
    let response = match result {
        Ok(answer) => respond(answer),
        Err(error) => refusal(&error),
    };
    record.code = response.status().as_u16();
    shared.record(record);
    Ok(spoil(response, fault.as_ref()))
}

/// Waits for the release. Dropped with its request when the connection ends.
async fn held(shared: &Shared) {
    let mut releasing = shared.releasing.subscribe();
    let _held = Counted::begin(shared, |state| &mut state.held);
    // The sender lives in `shared`.
    let _ = releasing.changed().await;
}

/// Bodies are read for writing methods only. An error is the refusal to answer with.
async fn read_body(incoming: Incoming, method: &Method) -> Result<Bytes, ApiError> {
    if !matches!(*method, Method::POST | Method::PUT | Method::PATCH | Method::DELETE) {
        return Ok(Bytes::new());
    }
    match tokio::time::timeout(BODY_DEADLINE, Limited::new(incoming, BODY_LIMIT).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(ApiError::too_large(format!("limit is {BODY_LIMIT}")))
        }
        Ok(Err(error)) => Err(ApiError::bad_request(format!("error reading the body: {error}"))),
        Err(_) => Err(ApiError::of_code(504, None)),
    }
}

fn headers_of(response: &mut Response<Body>, content_type: &'static str) {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-cache, private"));
}

fn respond(answer: Answer) -> Response<Body> {
    let (code, body, content_type) = match answer {
        Answer::Json(code, value) => (code, full(value.to_string() + "\n"), "application/json"),
        Answer::Text(code, text) => (code, full(text), "text/plain; charset=utf-8"),
        Answer::Watch(watcher) => {
            let stream = futures::stream::unfold(watcher, |mut watcher| async move {
                let frame = watcher.next().await?;
                Some((frame, watcher))
            });
            (200, StreamBody::new(stream).boxed_unsync(), "application/json")
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    headers_of(&mut response, content_type);
    response
}

fn refusal(error: &ApiError) -> Response<Body> {
    let body = if error.plain { error.message.clone() } else { error.status().to_string() + "\n" };
    let mut response = Response::new(full(body));
    *response.status_mut() = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    headers_of(&mut response, if error.plain { "text/plain; charset=utf-8" } else { "application/json" });
    if let Some(seconds) = error.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// Slows or cuts the body of an answer.
fn spoil(response: Response<Body>, fault: Option<&FaultAction>) -> Response<Body> {
    let (chunk, pause, limit) = match fault {
        Some(FaultAction::SlowBody { chunk, pause }) => ((*chunk).max(1), *pause, usize::MAX),
        Some(FaultAction::CutBodyAfter(limit)) => (usize::MAX, Duration::ZERO, *limit),
        _ => return response,
    };
    let (parts, body) = response.into_parts();
    let stream = futures::stream::unfold((body, Bytes::new(), 0_usize, false), move |state| async move {
        let (mut body, mut rest, sent, over) = state;
        if over {
            return None;
        }
        while rest.is_empty() {
            match body.frame().await? {
                Ok(frame) => rest = frame.into_data().unwrap_or_default(),
                Err(error) => return Some((Err(error), (body, rest, sent, true))),
            }
        }
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let size = chunk.min(rest.len()).min(limit - sent);
        if size == 0 {
            tokio::time::sleep(super::FLUSH).await;
            let error = io::Error::new(io::ErrorKind::ConnectionAborted, "Body cut by an injected fault");
            return Some((Err(error), (body, rest, sent, true)));
        }
        let piece = rest.split_to(size);
        Some((Ok(Frame::data(piece)), (body, rest, sent + size, false)))
    });
    Response::from_parts(parts, StreamBody::new(stream).boxed_unsync())
}

impl Exchange {
    fn answer(mut self, body: Result<Bytes, ApiError>, fault: Option<&FaultAction>) -> Result<Answer, ApiError> {
        self.user.authorize(&self.info)?;
        if self.info.resource.is_empty() {
            return self.top_level();
        }
        let (group, version) = (self.info.group.as_str(), self.info.version.as_str());
        let review = group == "authorization.k8s.io" && self.info.resource == "selfsubjectaccessreviews";
        let known = super::resources::RESOURCES.iter().any(|r| r.group == group && r.version == version);
        if !(known || review && version == "v1") {
            return Err(ApiError::no_such_path());
        }
        self.body = body?;
        if review {
            return self.self_review();
        }
        let rt = ResourceType::find(group, version, &self.info.resource).ok_or_else(ApiError::no_such_resource)?;
        if !rt.namespaced && rt.resource != "namespaces" && !self.info.namespace.is_empty() {
            return Err(ApiError::no_such_resource());
        }
        let item = self.names_one();
        if item && rt.namespaced && self.info.namespace.is_empty() {
            return Err(ApiError::no_such_resource());
        }
        if !self.info.subresource.is_empty() {
            if !rt.subresources.contains(&self.info.subresource.as_str()) {
                return Err(ApiError::no_such_resource());
            }
            if self.info.subresource == "eviction" {
                return self.evict(rt);
            }
        }
        self.route(rt, item, fault)
    }

    /// The path (not only a selector) names one object.
    fn names_one(&self) -> bool {
        !self.info.name.is_empty() && !matches!(self.info.verb.as_str(), "list" | "watch")
    }

    fn route(&self, rt: &'static ResourceType, item: bool, fault: Option<&FaultAction>) -> Result<Answer, ApiError> {
        match (self.method.as_str(), item) {
            ("GET", true) => self.get(rt),
            ("PUT", true) => self.put(rt),
            ("PATCH", true) => self.patch(rt),
            ("DELETE", true) if self.info.subresource.is_empty() => self.delete(rt),
            ("GET", false) if self.info.verb == "watch" => self.watch(rt, fault),
            ("GET", false) => self.list(rt),
            ("POST", false) if !rt.namespaced || !self.info.namespace.is_empty() => self.create(rt),
            ("DELETE", false) if rt.delete_collection && (!rt.namespaced || !self.info.namespace.is_empty()) => {
                self.delete_all(rt)
            }
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    fn top_level(&self) -> Result<Answer, ApiError> {
        let path = self.info.path.as_str();
        if self.method != Method::GET {
            let known = discovery(path).is_some() || ["/healthz", "/livez", "/readyz"].contains(&path);
            return Err(if known { ApiError::method_not_allowed() } else { ApiError::no_such_path() });
        }
        if ["/healthz", "/livez", "/readyz"].contains(&path) {
            return Ok(Answer::Text(200, "ok"));
        }
        discovery(path).map(|value| Answer::Json(200, value)).ok_or_else(ApiError::no_such_path)
    }

    fn self_review(&self) -> Result<Answer, ApiError> {
        if self.method != Method::POST || !self.info.name.is_empty() {
            return Err(ApiError::method_not_allowed());
        }
        let mut review = self.json_body()?;
        let asked = review["spec"]["resourceAttributes"].clone();
        let text = |key: &str| asked[key].as_str().unwrap_or_default().to_owned();
        let info = RequestInfo {
            verb: text("verb"),
            group: text("group"),
            namespace: text("namespace"),
            resource: text("resource"),
            subresource: text("subresource"),
            name: text("name"),
            ..RequestInfo::default()
        };
        if !review.is_object() || info.resource.is_empty() {
            let error = FieldError::invalid(
                "spec.resourceAttributes",
                "null",
                "exactly one of nonResourceAttributes or resourceAttributes must be specified",
            );
            return Err(ApiError::invalid("SelfSubjectAccessReview.authorization.k8s.io", "", &[error]));
        }
        review["kind"] = "SelfSubjectAccessReview".into();
        review["apiVersion"] = "authorization.k8s.io/v1".into();
        review["status"] = json!({"allowed": self.user.may(&info)});
        Ok(Answer::Json(201, review))
    }

    /// What the Accept header settles on.
    fn form(&self) -> Result<Form, ApiError> {
        let accept = text_header(&self.headers, header::ACCEPT);
        if accept.trim().is_empty() {
            return Ok(Form::Whole);
        }
        for clause in accept.split(',') {
            let mut parts = clause.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            if !["application/json", "application/*", "*/*"].contains(&media) {
                continue;
            }
            let parameters: BTreeMap<&str, &str> = parts.filter_map(|part| part.split_once('=')).collect();
            let meta = parameters.get("g") == Some(&"meta.k8s.io") && parameters.get("v") == Some(&"v1");
            match parameters.get("as").copied() {
                None => return Ok(Form::Whole),
                Some("PartialObjectMetadata") if meta => return Ok(Form::Partial),
                Some("PartialObjectMetadataList") if meta => return Ok(Form::PartialList),
                // Tables and versions that are not served: the next clause may do.
                Some(_) => {}
            }
        }
        Err(ApiError::not_acceptable("only the following media types are accepted: application/json"))
    }

    fn one(&self, rt: &ResourceType, code: u16, object: &Value) -> Result<Answer, ApiError> {
        let wire = rt.to_wire(object);
        match self.form()? {
            Form::Whole => Ok(Answer::Json(code, wire)),
            Form::Partial => Ok(Answer::Json(code, partial(&wire))),
            Form::PartialList => Err(ApiError::not_acceptable(
                "you requested PartialObjectMetadataList, but the requested object is not a list",
            )),
        }
    }

    fn json_body(&self) -> Result<Value, ApiError> {
        let content_type = text_header(&self.headers, header::CONTENT_TYPE);
        let media = content_type.split(';').next().unwrap_or_default().trim();
        if !media.is_empty() && media != "application/json" {
            return Err(ApiError::unsupported_media_type(&["application/json"]));
        }
        serde_json::from_slice(&self.body).map_err(|e| {
            ApiError::bad_request(format!(
                "the object provided is unrecognized: couldn't get version/kind; json parse error: {e}"
            ))
        })
    }

    fn number(&self, key: &str) -> Result<Option<u64>, ApiError> {
        match self.query.get(key).filter(|text| !text.is_empty()) {
            None => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!(
                    "{key}: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
                ))
            }),
        }
    }

    fn writing(&self) -> Result<Writing<'_>, ApiError> {
        let dry_run = match self.query.get("dryRun") {
            None | Some("") => false,
            Some("All") => true,
            Some(other) => {
                let error = FieldError::invalid("dryRun", other, "supported values: \"All\"");
                return Err(ApiError::invalid("Options.meta.k8s.io", "", &[error]));
            }
        };
        let named = self.query.text("fieldManager");
        if named.len() > 128 {
            let error = FieldError::too_long("fieldManager", 128);
            return Err(ApiError::invalid("Options.meta.k8s.io", "", &[error]));
        }
        let agent = text_header(&self.headers, header::USER_AGENT);
        let manager = if named.is_empty() { agent.split('/').next().unwrap_or_default() } else { named };
        let manager: String = manager.chars().filter(|c| !c.is_control()).take(128).collect();
        Ok(Writing {
            user: &self.user,
            manager: if manager.is_empty() { "unknown".to_owned() } else { manager },
            dry_run,
            strict: self.query.text("fieldValidation") == "Strict",
            privileged: false,
        })
    }

    fn target(&self, rt: &'static ResourceType) -> Target<'_> {
        Target {
            rt,
            subresource: &self.info.subresource,
            namespace: if rt.namespaced { &self.info.namespace } else { "" },
            name: &self.info.name,
        }
    }

    fn get(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        let state = self.shared.lock();
        let asked = self.number("resourceVersion")?.unwrap_or(0);
        if asked > state.version {
            return Err(ApiError::version_too_large(asked, state.version));
        }
        let object = state.found(self.target(rt))?;
        self.one(rt, 200, &object)
    }

    fn create(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        let body = self.json_body()?;
        let object = self.shared.lock().create(&self.writing()?, rt, &self.info.namespace, body)?;
        self.one(rt, 201, &object)
    }

    fn put(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        let body = self.json_body()?;
        let (object, created) = self.shared.lock().update(&self.writing()?, self.target(rt), body)?;
        self.one(rt, if created { 201 } else { 200 }, &object)
    }

    fn patch(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        let kind = PatchKind::of(&text_header(&self.headers, header::CONTENT_TYPE))
            .ok_or_else(|| ApiError::unsupported_media_type(&PatchKind::ACCEPTED))?;
        let writing = self.writing()?;
        let force = self.query.get("force").is_some();
        let error = if kind == PatchKind::Apply && self.query.text("fieldManager").is_empty() {
            Some(FieldError::required("fieldManager", "is required for apply patch"))
        } else if kind != PatchKind::Apply && force {
            Some(FieldError::forbidden("force", "may not be specified for non-apply patch"))
        } else {
            None
        };
        if let Some(error) = error {
            return Err(ApiError::invalid("PatchOptions.meta.k8s.io", "", &[error]));
        }
        let force = self.query.flag("force");
        let (object, created) = self.shared.lock().patch(&writing, self.target(rt), kind, &self.body, force)?;
        self.one(rt, if created { 201 } else { 200 }, &object)
    }

    fn delete_options(&self) -> Result<DeleteOptions, ApiError> {
        let body = if self.body.is_empty() { Value::Null } else { self.json_body()? };
        let grace = self.number("gracePeriodSeconds")?.and_then(|grace| i64::try_from(grace).ok());
        DeleteOptions::read(&body, grace)
    }

    fn delete(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        let options = self.delete_options()?;
        let deleted = self.shared.lock().delete(&self.writing()?, self.target(rt), &options)?;
        match deleted {
            Deleted::Marked(object) => self.one(rt, 200, &object),
            Deleted::Gone(object) if rt.returns_deleted => self.one(rt, 200, &object),
            Deleted::Gone(object) => {
                let mut details = Map::new();
                details.insert("name".into(), self.info.name.as_str().into());
                if !rt.group.is_empty() {
                    details.insert("group".into(), rt.group.into());
                }
                details.insert("kind".into(), rt.resource.into());
                details.insert("uid".into(), object["metadata"]["uid"].clone());
                Ok(Answer::Json(
                    200,
                    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}),
                ))
            }
        }
    }

    fn evict(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        if self.method != Method::POST {
            return Err(ApiError::method_not_allowed());
        }
        let body = self.json_body()?;
        self.shared.lock().evict(&self.writing()?, self.target(rt), &body)?;
        Ok(Answer::Json(
            201,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
        ))
    }

    fn scope(&self, rt: &'static ResourceType) -> Result<Scope, ApiError> {
        let fields = FieldSelector::parse(self.query.text("fieldSelector"))?;
        fields.check(rt.fields)?;
        Ok(Scope {
            rt,
            namespace: if rt.namespaced { self.info.namespace.clone() } else { String::new() },
            labels: LabelSelector::parse(self.query.text("labelSelector"))?,
            fields,
        })
    }

    fn list_meta(
        &self,
        rt: &ResourceType,
        version: u64,
        items: Vec<Value>,
        more: Option<(String, usize)>,
    ) -> Result<Answer, ApiError> {
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if let Some((token, remaining)) = more {
            metadata["continue"] = token.into();
            if self.query.text("labelSelector").is_empty() && self.query.text("fieldSelector").is_empty() {
                metadata["remainingItemCount"] = remaining.into();
            }
        }
        let (kind, api_version, items): (String, String, Vec<Value>) = match self.form()? {
            // Items of typed lists carry no kind of their own.
            Form::Whole => {
                let bare = |mut item: Value| {
                    if let Some(object) = item.as_object_mut() {
                        object.remove("kind");
                        object.remove("apiVersion");
                    }
                    item
                };
                (format!("{}List", rt.kind), rt.api_version(), items.into_iter().map(bare).collect())
            }
            Form::PartialList => (
                "PartialObjectMetadataList".to_owned(),
                "meta.k8s.io/v1".to_owned(),
                items.iter().map(partial).collect(),
            ),
            Form::Partial => {
                return Err(ApiError::not_acceptable(
                    "you requested PartialObjectMetadata, but the requested object is a list",
                ));
            }
        };
        Ok(Answer::Json(200, json!({"kind": kind, "apiVersion": api_version, "metadata": metadata, "items": items})))
    }

    fn list_options_error(field: &str, detail: &str) -> ApiError {
        ApiError::invalid("ListOptions.meta.k8s.io", "", &[FieldError::forbidden(field, detail)])
    }

    fn list(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        let scope = self.scope(rt)?;
        let limit = usize::try_from(self.number("limit")?.unwrap_or(0)).unwrap_or(0);
        let asked = self.number("resourceVersion")?;
        let matching = self.query.text("resourceVersionMatch");
        if self.query.get("sendInitialEvents").is_some() {
            return Err(Self::list_options_error("sendInitialEvents", "sendInitialEvents is forbidden for list"));
        }
        if !matching.is_empty() && asked.is_none() {
            return Err(Self::list_options_error(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        if !["", "Exact", "NotOlderThan"].contains(&matching) || (matching == "Exact" && asked == Some(0)) {
            return Err(Self::list_options_error("resourceVersionMatch", "unsupported resourceVersionMatch"));
        }
        if asked.is_some_and(|asked| asked > 0) && !self.query.text("continue").is_empty() {
            return Err(ApiError::bad_request("specifying resource version is not allowed when using continue"));
        }
        // Whoever is content with any version is served from the watch cache, which knows no chunks.
        let limit = if asked == Some(0) && self.query.text("continue").is_empty() { 0 } else { limit };
        let state = self.shared.lock();
        let (version, after) = match self.query.text("continue") {
            "" => (None, None),
            token => {
                let (version, key) = read_token(token)?;
                (Some(version), Some(key))
            }
        };
        if let Some(asked) = asked
            && asked > state.version
        {
            return Err(ApiError::version_too_large(asked, state.version));
        }
        let exact = matching == "Exact" || (limit > 0 && matching.is_empty() && asked.is_some_and(|v| v > 0));
        let version = version.or(if exact { asked } else { None }).unwrap_or(state.version);
        let gone = || {
            ApiError::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new \
                 list without the continue parameter, or use the continue token in this response to retrieve the \
                 remainder of the results.",
            )
        };
        let past;
        let objects = if version == state.version {
            &state.objects
        } else {
            past = state.at_version(version).ok_or_else(gone)?;
            &past
        };
        let after = after.map(|(namespace, name)| (rt.storage, namespace, name));
        let found: Vec<(&Key, Value)> = objects
            .iter()
            .filter(|(key, object)| {
                scope.covers(key) && after.as_ref().is_none_or(|after| *key > after) && scope.matches(object)
            })
            .map(|(key, object)| (key, rt.to_wire(object)))
            .collect();
        let remaining = if limit == 0 { 0 } else { found.len().saturating_sub(limit) };
        let more = if remaining > 0 {
            found.get(limit - 1).map(|(key, _)| (make_token(version, key), remaining))
        } else {
            None
        };
        let keep = found.len() - remaining;
        self.list_meta(rt, version, found.into_iter().take(keep).map(|(_, item)| item).collect(), more)
    }

    fn delete_all(&self, rt: &'static ResourceType) -> Result<Answer, ApiError> {
        let scope = self.scope(rt)?;
        let options = self.delete_options()?;
        let writing = self.writing()?;
        let mut guard = self.shared.lock();
        let state: &mut State = &mut guard;
        let keys: Vec<Key> = state
            .objects
            .iter()
            .filter(|(key, object)| scope.covers(key) && scope.matches(object))
            .map(|(key, _)| key.clone())
            .collect();
        let mut items = Vec::new();
        for (_, namespace, name) in &keys {
            let target = Target { rt, subresource: "", namespace, name };
            match state.delete(&writing, target, &options)? {
                Deleted::Gone(object) | Deleted::Marked(object) => items.push(rt.to_wire(&object)),
            }
        }
        let version = state.version;
        self.list_meta(rt, version, items, None)
    }

    fn watch(&self, rt: &'static ResourceType, fault: Option<&FaultAction>) -> Result<Answer, ApiError> {
        let scope = self.scope(rt)?;
        let from = self.number("resourceVersion")?;
        let seconds = self.number("timeoutSeconds")?.unwrap_or(0);
        let bookmarks = self.query.flag("allowWatchBookmarks");
        let matching = self.query.text("resourceVersionMatch");
        let initial = self.query.get("sendInitialEvents").is_some();
        let config = &self.shared.config;
        if initial && !config.watch_list {
            return Err(Self::list_options_error(
                "sendInitialEvents",
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            ));
        }
        if initial && matching != "NotOlderThan" {
            return Err(Self::list_options_error(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        if !initial && !matching.is_empty() {
            return Err(Self::list_options_error(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        let wanted = self.query.flag("sendInitialEvents");
        {
            let state = self.shared.lock();
            if let Some(asked) = from.filter(|asked| initial && *asked > state.version) {
                return Err(ApiError::version_too_large(asked, state.version));
            }
            if config.gone_as_response
                && let Some(asked) = from.filter(|asked| !initial && *asked > 0 && *asked < state.compacted)
            {
                return Err(ApiError::expired(format!("too old resource version: {asked} ({})", state.compacted)));
            }
        }
        let metadata_only = match self.form()? {
            Form::Whole => false,
            Form::Partial => true,
            Form::PartialList => {
                return Err(ApiError::not_acceptable(
                    "you requested PartialObjectMetadataList, but the requested object is not a list",
                ));
            }
        };
        // With sendInitialEvents=false the watch begins at the version asked for, or now.
        let from = match (initial, wanted, from) {
            (true, true, _) => None,
            (true, false, None | Some(0)) => Some(self.shared.lock().version),
            (_, _, from) => from,
        };
        Ok(Answer::Watch(Box::new(Watcher::new(
            Arc::clone(&self.shared),
            WatchRequest {
                user: self.user.name.clone(),
                scope,
                from,
                bookmarks,
                initial_bookmark: initial && wanted && bookmarks,
                timeout: if seconds == 0 { WATCH_DEFAULT } else { Duration::from_secs(seconds.min(86_400)) },
                metadata_only,
                fault: fault.cloned(),
            },
        ))))
    }
}

/// The token of a chunked list: hex, so that it passes any URL unharmed.
fn make_token(version: u64, key: &Key) -> String {
    let text = json!({"rv": version, "ns": key.1, "name": key.2}).to_string();
    text.bytes().flat_map(|byte| [byte >> 4, byte & 15]).filter_map(|n| char::from_digit(n.into(), 16)).collect()
}

fn read_token(token: &str) -> Result<(u64, (String, String)), ApiError> {
    let bad = || ApiError::bad_request("continue key is not valid");
    let bytes: Option<Vec<u8>> = token
        .as_bytes()
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect();
    let value: Value = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).ok_or_else(bad)?;
    let version = value["rv"].as_u64().ok_or_else(bad)?;
    let text = |key: &str| value[key].as_str().map(str::to_owned).ok_or_else(bad);
    Ok((version, (text("ns")?, text("name")?)))
}
