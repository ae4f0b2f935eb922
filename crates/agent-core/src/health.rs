//! The flag of the health endpoint.

use std::net::SocketAddr;

/// Where, if anywhere, `/healthz`, `/readyz` and `/metrics` are served.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct HealthArgs {
    /// Address of the HTTP endpoint with /healthz, /readyz, /metrics and, from this machine alone, /state, such as 0.0.0.0:8080; empty serves none
    #[arg(long = "health-addr", env = "HEALTH_ADDR", value_name = "ADDR", default_value = "")]
    pub health_addr: String,
}

/// A text that is not a socket address.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not an address for --health-addr (HEALTH_ADDR): give IP:PORT, such as 0.0.0.0:8080, or nothing")]
pub struct HealthAddrError {
    text: String,
    source: std::net::AddrParseError,
}

impl HealthArgs {
    /// The address, or none when the endpoint is switched off (the default).
    pub fn addr(&self) -> Result<Option<SocketAddr>, HealthAddrError> {
        let text = self.health_addr.trim();
        if text.is_empty() {
            return Ok(None);
        }
        // `:8080` is what people write for "all addresses" in Go programs.
        let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
        full.parse().map(Some).map_err(|source| HealthAddrError { text: text.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let addr = |text: &str| HealthArgs { health_addr: text.to_owned() }.addr();
        assert_eq!(addr("").unwrap(), None);
        assert_eq!(addr("127.0.0.1:9").unwrap().unwrap().to_string(), "127.0.0.1:9");
        assert_eq!(addr(":8080").unwrap().unwrap().to_string(), "0.0.0.0:8080");
        assert_eq!(addr("[::]:8080").unwrap().unwrap().port(), 8080);
        assert!(addr("8080").unwrap_err().to_string().contains("HEALTH_ADDR"));
    }
}
