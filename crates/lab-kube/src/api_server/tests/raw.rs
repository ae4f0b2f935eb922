//! Bytes on the wire that no client of ours would send: each gets a clear refusal, and the server lives on.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

use super::super::{ApiServer, ApiServerConfig, Fault, FaultAction, Rule};

type Stream = StreamOwned<ClientConnection, TcpStream>;

struct Raw {
    server: ApiServer,
    token: String,
}

fn connect(server: &ApiServer) -> Stream {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(server.ca().as_bytes()).expect("PEM")).expect("root");
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    // The name of in-cluster clients is in the certificate, too.
    let name = ServerName::try_from("kubernetes.default.svc").expect("name");
    let tcp = TcpStream::connect(server.address()).expect("connect");
    tcp.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).expect("client"), tcp)
}

/// Code, head and body of one answer; the connection is asked to close.
fn exchange(server: &ApiServer, request: &[u8]) -> (u16, String, String) {
    let mut stream = connect(server);
    // A server that refuses early may close before everything is written.
    let _ = stream.write_all(request);
    let _ = stream.flush();
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    (code, head.to_lowercase(), body.to_owned())
}

impl Raw {
    fn new() -> Self {
        let server = ApiServer::start(ApiServerConfig::default()).expect("server");
        server.add_node("n", &[("a", "1")]).expect("node");
        server.add_pod("ns", "p", "n", &[]).expect("pod");
        let token = server.add_identity("admin", &[], Rule::cluster_admin());
        Self { server, token }
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, String) {
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            self.token,
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        exchange(&self.server, &request)
    }
}

/// Method, path, headers, body, and the code and reason expected.
type Case<'a> = (&'a str, &'a str, &'a str, &'a [u8], u16, &'a str);

const JSON: &str = "Content-Type: application/json\r\n";
const MERGE: &str = "Content-Type: application/merge-patch+json\r\n";
const STRATEGIC: &str = "Content-Type: application/strategic-merge-patch+json\r\n";
const PATCH: &str = "Content-Type: application/json-patch+json\r\n";
const APPLY: &str = "Content-Type: application/apply-patch+yaml\r\n";

#[test]
fn malformed_requests_get_a_status_and_nothing_panics() {
    let raw = Raw::new();
    let deep = "[".repeat(100_000);
    let huge = vec![b' '; 3 * 1024 * 1024 + 1];
    let cases: Vec<Case> = vec![
        ("POST", "/api/v1/nodes", JSON, b"{", 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, b"", 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, b"\xff\xfe\x00", 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, deep.as_bytes(), 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, b"[]", 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, br#"{"metadata":3}"#, 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, br#"{"kind":"Pod","metadata":{"name":"x"}}"#, 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, br#"{"metadata":{"name":"x","labels":{"a":1}}}"#, 400, "BadRequest"),
        ("POST", "/api/v1/nodes", JSON, br#"{"metadata":{}}"#, 422, "Invalid"),
        ("POST", "/api/v1/nodes", JSON, br#"{"metadata":{"name":"Bad_Name"}}"#, 422, "Invalid"),
        (
            "POST",
            "/api/v1/nodes?fieldValidation=Strict",
            JSON,
            br#"{"metadata":{"name":"x"},"nope":1}"#,
            400,
            "BadRequest",
        ),
        ("POST", "/api/v1/nodes", "Content-Type: application/yaml\r\n", b"a: b", 415, "UnsupportedMediaType"),
        ("POST", "/api/v1/nodes", JSON, &huge, 413, "RequestEntityTooLarge"),
        (
            "POST",
            "/api/v1/namespaces/none/pods",
            JSON,
            br#"{"metadata":{"name":"x"},"spec":{"containers":[{"name":"a","image":"b"}]}}"#,
            404,
            "NotFound",
        ),
        ("POST", "/api/v1/namespaces/ns/pods", JSON, br#"{"metadata":{"name":"x"}}"#, 422, "Invalid"),
        ("POST", "/api/v1/pods", JSON, b"{}", 405, "MethodNotAllowed"),
        ("PUT", "/api/v1/nodes", JSON, b"{}", 405, "MethodNotAllowed"),
        ("PUT", "/api/v1/nodes/n", JSON, br#"{"metadata":{"name":"m"}}"#, 400, "BadRequest"),
        ("PUT", "/api/v1/nodes/m", JSON, br#"{"metadata":{"name":"m"}}"#, 404, "NotFound"),
        ("PATCH", "/api/v1/nodes/n", JSON, b"{}", 415, "UnsupportedMediaType"),
        ("PATCH", "/api/v1/nodes/n", "", b"{}", 415, "UnsupportedMediaType"),
        ("PATCH", "/api/v1/nodes/n", MERGE, b"[]", 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n", MERGE, b"{", 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n", MERGE, br#"{"metadata":null}"#, 422, "Invalid"),
        ("PATCH", "/api/v1/nodes/n", MERGE, br#"{"metadata":{"labels":7}}"#, 422, "Invalid"),
        ("PATCH", "/api/v1/nodes/n", MERGE, br#"{"kind":"Pod"}"#, 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n", PATCH, br#"{"op":"add"}"#, 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n", PATCH, br#"[{"op":"remove","path":""}]"#, 422, "Invalid"),
        ("PATCH", "/api/v1/nodes/n", PATCH, br#"[{"op":"replace","path":"","value":[]}]"#, 422, "Invalid"),
        ("PATCH", "/api/v1/nodes/n", STRATEGIC, br#"{"metadata":{"labels":[1]}}"#, 422, "Invalid"),
        ("PATCH", "/api/v1/nodes/n", STRATEGIC, br#"{"metadata":{"$nope":1}}"#, 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n", APPLY, b"{}", 422, "Invalid"),
        ("PATCH", "/api/v1/nodes/n?force=true", MERGE, b"{}", 422, "Invalid"),
        ("GET", "/api/v1/nodes?continue=7b7d&resourceVersion=5", "", b"", 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n?fieldManager=x", APPLY, b"a: b", 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n?fieldManager=x", APPLY, b"{}", 400, "BadRequest"),
        ("PATCH", "/api/v1/nodes/n?fieldManager=x", APPLY, b"7", 400, "BadRequest"),
        ("DELETE", "/api/v1/nodes/n", JSON, b"[", 400, "BadRequest"),
        ("DELETE", "/api/v1/nodes/n", JSON, br#"{"kind":"Node"}"#, 400, "BadRequest"),
        ("DELETE", "/api/v1/namespaces/ns/pods/p", JSON, br#"{"gracePeriodSeconds":-1}"#, 422, "Invalid"),
        ("POST", "/api/v1/namespaces/ns/pods/p/eviction", JSON, b"[]", 400, "BadRequest"),
        ("POST", "/api/v1/namespaces/ns/pods/p/eviction", JSON, b"{}", 400, "BadRequest"),
        ("GET", "/api/v1/namespaces/ns/pods/p/eviction", "", b"", 405, "MethodNotAllowed"),
        ("GET", "/api/v1/nodes?fieldSelector=nope%3D1", "", b"", 400, "BadRequest"),
        ("GET", "/api/v1/nodes?labelSelector=a%20in%201", "", b"", 400, "BadRequest"),
        ("GET", "/api/v1/nodes?limit=x", "", b"", 400, "BadRequest"),
        ("GET", "/api/v1/nodes?continue=zz%ff", "", b"", 400, "BadRequest"),
        ("GET", "/api/v1/nodes?watch=1&resourceVersion=-1", "", b"", 400, "BadRequest"),
        ("GET", "/api/v1/nodes?resourceVersion=999999", "", b"", 504, "Timeout"),
        ("GET", "/api/v1/nodes?resourceVersionMatch=Exact", "", b"", 422, "Invalid"),
        ("GET", "/api/v1/nodes?watch=1&sendInitialEvents=true", "", b"", 422, "Invalid"),
        ("GET", "/api/v1/nodes", "Accept: application/yaml\r\n", b"", 406, "NotAcceptable"),
        (
            "GET",
            "/api/v1/nodes",
            "Accept: application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1\r\n",
            b"",
            406,
            "NotAcceptable",
        ),
        ("GET", "/api/v1/widgets", "", b"", 404, "NotFound"),
        ("GET", "/api/v1/nodes/n/log", "", b"", 404, "NotFound"),
        ("GET", "/api/v1/namespaces/ns/nodes/n", "", b"", 404, "NotFound"),
        ("BREW", "/api/v1/nodes", "", b"", 405, "MethodNotAllowed"),
    ];
    for (method, path, headers, body, code, reason) in cases {
        let (got, _, text) = raw.send(method, path, headers, body);
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]);
        assert_eq!(got, code, "{method} {path} {shown}: {text}");
        let status: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{method} {path}: {e}: {text}"));
        assert_eq!((&status["kind"], &status["reason"]), (&"Status".into(), &reason.into()), "{method} {path} {shown}");
        assert_eq!(status["code"], code, "{method} {path}");
    }
    assert_eq!(raw.server.labels("n")["a"], "1");
    assert_eq!(raw.send("GET", "/healthz", "", b"").0, 200, "the server lives on");
}

#[test]
fn paths_outside_the_api_are_plain_404_and_anonymous_is_named() {
    let raw = Raw::new();
    for path in ["/nope", "/apis/widgets.example/v1/widgets", "/api/v2/nodes"] {
        let (code, head, body) = raw.send("GET", path, "", b"");
        assert_eq!((code, body.as_str()), (404, "404 page not found\n"), "{path}");
        assert!(head.contains("content-type: text/plain"), "{head}");
    }
    let close = "Host: x\r\nConnection: close\r\n\r\n";
    let (code, _, body) = exchange(&raw.server, format!("GET /api/v1/nodes HTTP/1.1\r\n{close}").as_bytes());
    assert_eq!(code, 403);
    assert!(body.contains(r#"nodes is forbidden: User \"system:anonymous\" cannot list resource \"nodes\" in API group \"\" at the cluster scope"#), "{body}");
    let (code, _, body) = exchange(&raw.server, format!("GET /apis HTTP/1.1\r\n{close}").as_bytes());
    assert_eq!(code, 403);
    assert!(body.contains(r#"forbidden: User \"system:anonymous\" cannot get path \"/apis\""#), "{body}");
    assert_eq!(exchange(&raw.server, format!("GET /readyz HTTP/1.1\r\n{close}").as_bytes()).0, 200);
    let wrong = format!("GET /api/v1/nodes HTTP/1.1\r\nAuthorization: Bearer nope\r\n{close}");
    assert_eq!(exchange(&raw.server, wrong.as_bytes()).0, 401);
}

#[test]
fn noise_on_the_socket_does_no_harm() {
    let raw = Raw::new();
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\xff\xff", b"\0\0\0\0"] {
        let mut tcp = TcpStream::connect(raw.server.address()).expect("connect");
        tcp.write_all(noise).expect("noise");
    }
    for noise in [&b"\0\0\0\r\n\r\n"[..], b"GET\r\n\r\n", b"POST /api/v1/nodes HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]
    {
        let mut stream = connect(&raw.server);
        stream.write_all(noise).expect("noise");
        stream.flush().expect("flush");
    }
    assert_eq!(raw.send("GET", "/healthz", "", b"").0, 200);
}

#[test]
fn too_many_requests_names_the_wait_and_connections_are_kept() {
    let raw = Raw::new();
    raw.server.inject(Fault::new(FaultAction::Status { code: 429, retry_after: Some(3) }));
    let (code, head, _) = raw.send("GET", "/api/v1/nodes/n", "", b"");
    assert_eq!(code, 429);
    assert!(head.contains("retry-after: 3"), "{head}");
    let mut stream = connect(&raw.server);
    for _ in 0..3 {
        let request = format!("GET /healthz HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n", raw.token);
        stream.write_all(request.as_bytes()).expect("same connection");
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"ok") {
            let mut one = [0];
            assert_eq!(stream.read(&mut one).expect("answer"), 1);
            bytes.push(one[0]);
        }
    }
}

#[test]
fn list_items_carry_no_kind_and_deletions_answer_with_a_status() {
    let raw = Raw::new();
    let (_, _, body) = raw.send("GET", "/api/v1/nodes", "", b"");
    let list: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!((&list["kind"], list["items"][0].get("kind")), (&"NodeList".into(), None));
    let (code, _, body) = raw.send("DELETE", "/api/v1/nodes/n", "", b"");
    let status: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!((code, &status["status"], &status["details"]["kind"]), (200, &"Success".into(), &"nodes".into()));
    for path in ["/api", "/apis", "/api/v1", "/apis/events.k8s.io", "/apis/events.k8s.io/v1", "/version"] {
        let (code, _, body) = raw.send("GET", path, "", b"");
        assert_eq!(code, 200, "{path}");
        serde_json::from_str::<Value>(&body).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

#[test]
fn a_dry_run_changes_nothing() {
    let raw = Raw::new();
    let before = raw.server.resource_version();
    let (code, _, body) =
        raw.send("PATCH", "/api/v1/nodes/n?dryRun=All", MERGE, br#"{"metadata":{"labels":{"a":"2"}}}"#);
    assert_eq!(code, 200);
    assert!(body.contains(r#""a":"2""#), "{body}");
    assert_eq!(raw.send("DELETE", "/api/v1/nodes/n?dryRun=All", "", b"").0, 200);
    assert_eq!(raw.send("POST", "/api/v1/nodes?dryRun=All", JSON, br#"{"metadata":{"name":"x"}}"#).0, 201);
    assert_eq!((raw.server.resource_version(), raw.server.labels("n")["a"].as_str()), (before, "1"));
}

#[test]
fn an_eviction_can_bring_its_own_grace() {
    let raw = Raw::new();
    let path = "/api/v1/namespaces/ns/pods/p/eviction";
    let body = br#"{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":"p"},"deleteOptions":{"gracePeriodSeconds":0}}"#;
    assert_eq!(raw.send("POST", path, JSON, body).0, 201);
    assert_eq!(raw.server.get("pods", "ns", "p"), None);
}
