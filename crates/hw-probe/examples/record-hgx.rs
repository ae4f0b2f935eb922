//! Writes the tree `testdata/hgx-h100`, for a first taste of `ccnode probe` and for tests.
//!
//! ```text
//! cargo run -p hw-probe --example record-hgx testdata/hgx-h100
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use hw_probe::testing::FakeSysfs;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("Usage: record-hgx DIRECTORY");
        return ExitCode::from(2);
    };
    if path.exists() {
        eprintln!("{}: Exists already; delete it first", path.display());
        return ExitCode::FAILURE;
    }
    FakeSysfs::in_dir(path).hgx_h100();
    ExitCode::SUCCESS
}
