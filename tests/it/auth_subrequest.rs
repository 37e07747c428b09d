//! What the service behind `auth_proxy_url` is told of the request that it decides on.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

#[tokio::test]
async fn the_service_knows_what_was_asked_for_and_no_client_can_lie_about_it() {
    // Lets everything pass that only reads, as it is told.
    let judge = Provider::builder().api(|head, _| {
        let reads = head.header("x-forwarded-method") == Some("GET");
        let known = head.header("x-forwarded-uri").is_some_and(|uri| uri.starts_with("/system/"));
        Some((if reads && known { 200 } else { 403 }, String::new()))
    });
    let (judge, provider) = (judge.start(), Provider::by_hand());
    let gateway = Gateway::builder().provider(&provider).var("auth_proxy_url", judge.url());
    let gateway = gateway.start().await;
    let read = gateway.ask("GET", "/system/function/echo?namespace=a%2Fb&x", &[]).await;
    // The provider's own response.
    assert_eq!(read.text(), "not scripted", "{read}");
    let asked = judge.asked();
    let question = &asked[0].0;
    for (name, expect) in [
        ("x-forwarded-method", "GET"),
        ("x-forwarded-uri", "/system/function/echo?namespace=a%2Fb&x"),
        ("x-forwarded-host", "gateway.test"),
    ] {
        assert_eq!(question.header(name), Some(expect), "{name}");
    }
    let lies = [
        &["X-Forwarded-Method: GET", "X-Forwarded-Uri: /system/info", "X-Forwarded-Host: else"][..],
        &["X_Forwarded_Method: GET", "X.Forwarded.Uri: /system/info", "X-Forwarded_Host: else"],
        &["Connection: X-Forwarded-Method, X-Forwarded-Uri", "X-Forwarded-Method: GET"],
    ];
    for lie in lies {
        let refused = gateway.ask("DELETE", "/system/functions", lie).await;
        assert_eq!(refused.status(), 403, "{lie:?}: {refused}");
        let asked = judge.asked();
        let question = &asked.last().unwrap().0;
        let said: Vec<_> = question
            .headers
            .iter()
            .map(|(name, value)| (name.replace(['_', '.'], "-"), value.as_str()))
            .filter(|(name, _)| {
                ["x-forwarded-method", "x-forwarded-uri", "x-forwarded-host"].contains(&&**name)
            })
            .collect();
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(!said.iter().any(|(_, value)| ["GET", "/system/info", "else"].contains(value)));
    }
    // The provider is told by the client's proxy who is called, as before.
    let listed = gateway.ask("GET", "/system/functions", &["X-Forwarded-Host: public"]).await;
    assert_eq!(listed.status(), 200);
    assert_eq!(provider.asked().last().unwrap().0.header("x-forwarded-host"), Some("public"));
}
