//! Logs: one line an event, to standard error, as text for people or JSON for machines.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// The flags of logging, the same in every agent, before a subcommand as well as after it.
#[derive(clap::Args, Clone, Debug)]
pub struct LogArgs {
    /// Form of log lines
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Text, ignore_case = true, global = true)]
    pub log_format: LogFormat,

    /// Least level that is logged: error, warn, info, debug or trace, or a list such as info,gpu_firmware=debug
    #[arg(long, env = "LOG_LEVEL", value_name = "LEVEL", default_value = "info", global = true)]
    pub log_level: String,

    /// Log at level debug, whatever --log-level says
    #[arg(long, env = "CCNODE_DEBUG", value_parser = clap::builder::FalseyValueParser::new(), global = true)]
    pub debug: bool,
}

impl Default for LogArgs {
    fn default() -> Self {
        Self { log_format: LogFormat::Text, log_level: "info".to_owned(), debug: false }
    }
}

/// Form of log lines.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of text an event, coloured on a terminal.
    Text,
    /// One JSON object an event, its fields at the top level beside `timestamp`, `level`, `target` and `message`.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level is not one.
    #[error(
        "{text:?} is no log level for --log-level (LOG_LEVEL): give error, warn, info, debug, trace, or TARGET=LEVEL"
    )]
    Level {
        /// What was given.
        text: String,
        /// What the parser says.
        source: tracing_subscriber::filter::ParseError,
    },
    /// This process has set up logging before.
    #[error("Logging is already set up")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Sets up logging for this process.
pub fn init(args: &LogArgs) -> Result<(), LogError> {
    use tracing_subscriber::util::SubscriberInitExt;

    let filter = filter(args)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => {
            let colour =
                std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|text| text.is_empty());
            builder.with_ansi(colour).finish().try_init()
        }
        LogFormat::Json => {
            builder.json().flatten_event(true).with_current_span(false).with_span_list(false).finish().try_init()
        }
    }
    .map_err(LogError::Twice)
}

fn filter(args: &LogArgs) -> Result<EnvFilter, LogError> {
    // The wire-level chatter of the HTTP stack buries our own lines; LOG_LEVEL can still ask for it.
    const DEBUG: &str = "debug,h2=info,hyper=info,hyper_util=info,kube_client=info,rustls=info,tower=info";
    let level = args.log_level.trim();
    let text = if args.debug {
        DEBUG
    } else if level.is_empty() {
        "info"
    } else {
        level
    };
    EnvFilter::builder().parse(text).map_err(|source| LogError::Level { text: text.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        log: LogArgs,
    }

    #[test]
    fn levels() {
        for (given, shown) in [
            (vec!["x"], "info"),
            (vec!["x", "--log-level", "warn"], "warn"),
            (vec!["x", "--log-level", ""], "info"),
            (vec!["x", "--log-level", "info,gpu_firmware=debug"], "gpu_firmware=debug,info"),
        ] {
            let cli = Cli::try_parse_from(given).unwrap();
            assert_eq!(filter(&cli.log).unwrap().to_string(), shown);
        }
        let debug = Cli::try_parse_from(["x", "--debug", "--log-level", "error"]).unwrap();
        assert!(filter(&debug.log).unwrap().to_string().contains("debug"));
    }

    #[test]
    fn an_impossible_level_is_named() {
        let args = LogArgs { log_level: "info=loud".to_owned(), ..LogArgs::default() };
        let text = filter(&args).unwrap_err().to_string();
        assert!(text.contains("info=loud") && text.contains("LOG_LEVEL"), "{text}");
    }

    #[derive(Parser)]
    struct WithSubcommand {
        #[command(subcommand)]
        command: Run,
        #[command(flatten)]
        log: LogArgs,
    }

    #[derive(clap::Subcommand)]
    enum Run {
        Run,
    }

    #[test]
    fn flags_come_before_a_subcommand_or_after_it() {
        for words in
            ["x --log-format json --log-level warn --debug run", "x run --log-format json --log-level warn --debug"]
        {
            let WithSubcommand { command: Run::Run, log } =
                WithSubcommand::try_parse_from(words.split_whitespace()).unwrap();
            assert_eq!((log.log_format, log.log_level.as_str(), log.debug), (LogFormat::Json, "warn", true), "{words}");
        }
        let help = WithSubcommand::try_parse_from(["x", "run", "--help"]).err().unwrap().to_string();
        for flag in ["--log-format", "--log-level", "--debug"] {
            assert!(help.contains(flag), "{help}");
        }
    }

    #[test]
    fn formats() {
        assert_eq!(Cli::try_parse_from(["x", "--log-format", "JSON"]).unwrap().log.log_format, LogFormat::Json);
        assert!(Cli::try_parse_from(["x", "--log-format", "xml"]).is_err());
    }
}
