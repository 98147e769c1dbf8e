//! `lifl`: see `lifl --help`.

use std::process::ExitCode;

use clap::Parser as _;
use lifl::{
    cli::{Cli, Command},
    component, demo, status, up,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Up(args) => up::run(&args, cli.log, &cli.log_level),
        Command::Demo(args) => demo::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Crd => up::print_crd(),
        Command::Component(component) => component::main_as(component, cli.log, &cli.log_level),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifl: {error:#}");
            ExitCode::FAILURE
        }
    }
}
