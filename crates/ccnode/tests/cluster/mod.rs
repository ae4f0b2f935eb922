//! A stand-in of the API server, and a person with a kubeconfig who may do everything there.

use std::fs;

use ccnode::args::Args;
use clap::Parser as _;
use lab_kube::api_server::{ApiServer, ApiServerConfig, Rule};
use tempfile::TempDir;

pub(crate) struct Cluster {
    pub(crate) api: ApiServer,
    /// The person's.
    pub(crate) token: String,
    folder: TempDir,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let api = ApiServer::start(ApiServerConfig::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let token = api.add_identity("person", &[], Rule::cluster_admin());
        fs::write(folder.path().join("kubeconfig"), api.kubeconfig(&token, "127.0.0.1")).unwrap();
        Self { api, token, folder }
    }

    /// What the person's command ends with, prints and notes.
    pub(crate) fn run(&self, command: &str, line: &[&str]) -> (u8, String, String) {
        let kubeconfig = self.folder.path().join("kubeconfig");
        let common = ["ccnode", command, "--kubeconfig", kubeconfig.to_str().unwrap()];
        let args = Args::try_parse_from([&common, line].concat()).unwrap();
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let code = ccnode::run(&args, &mut out, &mut notes, false);
        (code, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
    }
}
