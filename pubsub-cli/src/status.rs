//! `pubsub status`.

use pubsub_client::Client;

use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::{format, values};

pub(crate) async fn run(client: &Client, output: &mut Output) -> Result<Exit, Failure> {
    let server = client.admin().server().await?;
    let up = values::now().duration_since(server.start_time).unwrap_or_default();
    output.fields(
        &format::server(client.url(), &server),
        &[
            ("server", client.url().to_owned()),
            ("state", server.state.clone()),
            ("version", server.version.clone()),
            ("boot id", format::hex(&server.boot_id)),
            (
                "started",
                format!("{} ({} ago)", format::time(server.start_time), format::duration(up)),
            ),
            ("storage", server.storage.clone()),
            ("topics", server.topics.to_string()),
            ("subscriptions", server.subscriptions.to_string()),
            ("connections", server.connections.to_string()),
        ],
    )?;
    if server.state == "SERVING" {
        return Ok(Exit::Ok);
    }
    output.flush()?;
    Err(Failure::failed(format!("the server does not take messages: {}", server.state)))
}
