//! The auth subrequest: what the service behind `auth_proxy_url` is sent about the request that it decides on.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

#[tokio::test]
async fn the_auth_service_is_sent_the_real_method_and_target() {
    // Allows requests that only read, judged by the headers of the subrequest.
    let auth_service = Provider::builder().api(|head, _| {
        let reads = head.header("x-forwarded-method") == Some("GET");
        let known = head.header("x-forwarded-uri").is_some_and(|uri| uri.starts_with("/system/"));
        Some((if reads && known { 200 } else { 403 }, String::new()))
    });
    let (auth_service, provider) = (auth_service.start(), Provider::manual());
    let gateway = Gateway::builder().provider(&provider).var("auth_proxy_url", auth_service.url());
    let gateway = gateway.start().await;
    let read = gateway.request("GET", "/system/function/echo?namespace=a%2Fb&x", &[]).await;
    // The provider's own response.
    assert_eq!(read.text(), "not scripted", "{read}");
    let requests = auth_service.api_requests();
    let question = &requests[0].0;
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
        let refused = gateway.request("DELETE", "/system/functions", lie).await;
        assert_eq!(refused.status(), 403, "{lie:?}: {refused}");
        let requests = auth_service.api_requests();
        let question = &requests.last().unwrap().0;
        let forwarded: Vec<_> = question
            .headers
            .iter()
            .map(|(name, value)| (name.replace(['_', '.'], "-"), value.as_str()))
            .filter(|(name, _)| {
                ["x-forwarded-method", "x-forwarded-uri", "x-forwarded-host"].contains(&&**name)
            })
            .collect();
        assert_eq!(forwarded.len(), 3, "{forwarded:?}");
        assert!(
            !forwarded.iter().any(|(_, value)| ["GET", "/system/info", "else"].contains(value))
        );
    }
    // The provider still receives the client's `X-Forwarded-Host`.
    let listed = gateway.request("GET", "/system/functions", &["X-Forwarded-Host: public"]).await;
    assert_eq!(listed.status(), 200);
    assert_eq!(
        provider.api_requests().last().unwrap().0.header("x-forwarded-host"),
        Some("public")
    );
}
