//! vhostd: gives virtual machines and containers their network card.
//!
//! The binary is daemon and command line in one. In a plug's order:
//!
//! - [`cli`] the command line, [`document`] a plug from a file, [`osvif`] from an os-vif object, [`client`] asks the daemon
//! - [`server`] the daemon's socket and its callers, [`api`] what can be asked, [`json`] bytes into values
//! - [`spec`] and [`names`] what a plug is asked to be, checked; [`status`] how far it has come
//! - [`plug`] makes it so: records it in [`store`], the host's network, the dataplane's ports
//! - [`events`], [`metrics`], [`table`] tell about it
//! - [`demo`] shows it
//! - [`daemon`] starts all this from its [`config`] and watches over it
#![forbid(unsafe_code)]
#![allow(unreachable_pub, reason = "a binary has no outside: `pub` marks what a module offers to the others")]

mod api;
mod cli;
mod client;
mod commands;
mod config;
mod daemon;
mod demo;
mod document;
mod events;
mod json;
mod logging;
mod metrics;
mod names;
mod osvif;
mod plug;
mod problem;
mod server;
mod spec;
mod status;
mod store;
mod table;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (error, code) = match cli.command {
        Command::Serve(args) => match daemon::serve(&args, cli.api.as_deref()) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (error.to_string(), error.exit_code()),
        },
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "vhostd", &mut io::stdout());
            return ExitCode::SUCCESS;
        }
        Command::Man => match clap_mangen::Man::new(Cli::command()).render(&mut io::stdout()) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (error.to_string(), 1),
        },
        _ => match ask(cli) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (error.to_string(), error.exit_code()),
        },
    };
    if code != 0 {
        eprintln!("vhostd: {error}");
    }
    ExitCode::from(code)
}

/// Runs a command that speaks with a daemon.
fn ask(cli: Cli) -> Result<(), commands::CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(commands::run(cli))
}
