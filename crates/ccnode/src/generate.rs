//! Shell completions and the manual page, from the command line's own definition.

use std::io::Write;

use clap::CommandFactory as _;

use crate::args::Args;

/// The completion script for a shell.
pub(crate) fn completions(shell: clap_complete::Shell, out: &mut impl Write) -> anyhow::Result<()> {
    // Rendered first: the generator panics where its writer fails.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "ccnode", &mut script);
    Ok(out.write_all(&script)?)
}

/// The manual page of the command and, one after the other, of each of its subcommands and theirs.
pub(crate) fn man(out: &mut impl Write) -> anyhow::Result<()> {
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    let mut page = Vec::new();
    let mut waiting = vec![&command];
    while let Some(part) = waiting.pop() {
        clap_mangen::Man::new(part.clone()).render(&mut page)?;
        let mut below: Vec<&clap::Command> = part.get_subcommands().filter(|part| !part.is_hide_set()).collect();
        below.reverse();
        waiting.append(&mut below);
    }
    Ok(out.write_all(&page)?)
}
